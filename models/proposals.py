"""The choice of proposals between the two stages of Deformable DETR and DINO."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BestProposals:
    """Chooses the tokens with the largest scores. Another choice is a subclass, or anything with the same two methods."""

    def __call__(self, scores: Tensor, num_proposals: int) -> Tensor:
        """Return the indices of the chosen tokens, the best first: [B, S] to [B, num_proposals].

        A choice may be called with more than that. Whatever a transformer passes reaches it in exported programs, too.
        """
        return scores.topk(num_proposals, dim=1).indices

    def exportable(self) -> 'AskedProposals':
        """Return what takes the place of this object in a program to export."""
        return AskedProposals(self)


class AskedProposals:
    """Makes another's choice unless it is asked for certain proposals, and tells what it took.

    Rounding decides between proposals whose scores are almost equal, and each query attends to all others. So an exported
    program is compared with what PyTorch computes for the same proposals, whose scores must be those of the choice, too.
    """

    def __init__(self, choose: BestProposals) -> None:
        self.choose = choose
        self.asked: Tensor | None = None  # indices [B, Q]
        self.taken: Tensor | None = None
        self.difference = 0.0  # between the scores of the proposals asked for and of those chosen

    def __call__(self, scores: Tensor, *more: object, **options: object) -> Tensor:
        self.taken = chosen = self.choose(scores, *more, **options)
        if self.asked is not None:
            self.taken = self.asked
            ours, theirs = (scores.gather(1, index).sigmoid() for index in (chosen, self.asked))
            self.difference = (ours - theirs).abs().max().item()
        return self.taken
