"""The `Windows` rule: whole attention windows are recomputed, by the dense network on fewer of them.

Windowed blocks need no memory then; only global blocks keep keys and values. All shapes follow from the number of
windows, which comes from a short list, so that a compiler can work them out beforehand. With every window selected it
equals the dense network. `rule` chooses the windows, `network` recomputes them, `cuda_graphs` captures that on a GPU.
"""
