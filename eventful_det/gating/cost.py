"""Operation counts. One multiply-add is 1 MAC (= 2 FLOP); what the paper calls "GFLOPs" are GMACs."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Counts:
    """Operations of one step, by kind, as the official eventful code counts them.

    Attributes:
        linear: multiply-adds of linear layers and convolutions.
        bias: elements that a bias is added to.
        matmul: multiply-adds of the attention products QK^T and A.V.
        einsum: multiply-adds of decomposed relative positions.
        add: elements of element-wise sums (position encoding, relative positions, residuals).
        gate: elements compared with their reference.
        accumulator: element-wise operations of the A.V delta accumulation (paper section 4.2).
        spared: multiply-adds and comparisons among these that did not run, less those that ran beside them.
    """

    linear: int = 0
    bias: int = 0
    matmul: int = 0
    einsum: int = 0
    add: int = 0
    gate: int = 0
    accumulator: int = 0
    spared: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.linear + other.linear,
            self.bias + other.bias,
            self.matmul + other.matmul,
            self.einsum + other.einsum,
            self.add + other.add,
            self.gate + other.gate,
            self.accumulator + other.accumulator,
            self.spared + other.spared,
        )

    @property
    def macs(self) -> int:
        """Multiply-adds that ran: products and gates. Sums without a product are not multiply-adds."""
        return self.linear + self.matmul + self.einsum + self.gate - self.spared

    @property
    def official(self) -> int:
        """All operations as the official eventful code counts them (its "GFLOPs" x 1e9)."""
        return sum(getattr(self, f.name) for f in fields(self)) - self.spared
