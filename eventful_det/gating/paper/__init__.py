"""The paper's rule (arXiv 2308.13494, section 4), for reproduction and for its ablations; the default is `Rows`.

Read it beside section 4: `gates` is 4.1, `attention` is 4.2, `rule` puts them into blocks.
"""

from eventful_det.gating.paper.rule import Paper, PaperState

__all__ = ["Paper", "PaperState"]
