"""
The first stage of two (Deformable DETR, arXiv:2010.04159, Sec. A.4; DINO, arXiv:2203.03605): the encoder's
tokens propose boxes, at which the decoder's queries start.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from util.errors import UserError

from .deformable_transformer import DeformableTransformer, cell_grid, gather_rows, valid_sizes
from .heads import ExactLinear, LogitBoxes
from .ops.functions import exporting
from .structures import Memory, Prediction


@dataclass(frozen=True)
class BestProposals:
    """The choice of the tokens with the largest scores.

    Another choice is a subclass, or an object with the same two methods.
    """

    def __call__(self, scores: Tensor, num_proposals: int) -> Tensor:
        """Return the indices of the chosen tokens, the best first: [B, S] to [B, num_proposals].

        A subclass may take more arguments. They are passed on in exported programs, too.
        """
        return scores.topk(num_proposals, dim=1).indices

    def exportable(self) -> 'AskedProposals':
        """Return the object that takes the place of this one in a program to export."""
        return AskedProposals(self)


class AskedProposals:
    """The choice of another object, unless certain proposals are requested; it remembers what it returned.

    Rounding decides between proposals whose scores are almost equal, and each query attends to all others.
    So an exported program is compared with the result of PyTorch for the same proposals, whose scores must
    be those of the choice, too.
    """

    def __init__(self, choose: BestProposals) -> None:
        self.choose = choose
        self.asked: Tensor | None = None  # indices [B, Q] to return in place of the choice
        self.taken: Tensor | None = None  # indices that were returned
        self.difference = 0.0  # between the scores of `asked` and of the choice

    def __call__(self, scores: Tensor, *args: object, **options: object) -> Tensor:
        self.taken = chosen = self.choose(scores, *args, **options)
        if self.asked is not None:
            self.taken = self.asked
            best, asked = (scores.gather(1, index).sigmoid() for index in (chosen, self.asked))
            self.difference = (best - asked).abs().max().item()
        return self.taken


@dataclass
class FirstStage:
    """Projection, heads and choice of proposals.

    It is no module: its modules belong to the transformer and to the lists of heads, which give them their
    official names.

    by_class: choose the tokens with the best logit of any class, and supervise these alone (DINO); else those
        with the best logit of class 0, which means 'object' here, and supervise all.
    """

    projection: nn.Module
    norm: nn.Module
    class_head: ExactLinear
    box_head: nn.Module
    box_code: LogitBoxes
    by_class: bool
    choose: Callable[..., Tensor] = BestProposals()

    @classmethod
    def of(
        cls, transformer: DeformableTransformer, class_head: ExactLinear, box_head: nn.Module
    ) -> 'FirstStage':
        """Build the first stage for the decoder of a transformer."""
        decoder, modules = transformer.decoder, (transformer.enc_output, transformer.enc_output_norm)
        return cls(*modules, class_head, box_head, decoder.box_code, decoder.proposals_by_class)

    def __call__(
        self, memory: Memory, num_proposals: int, training: bool
    ) -> tuple[Tensor, Prediction | None]:
        """Find proposals.

        Returns:
            Boxes [B, num_proposals, 4] without gradient, and while training the prediction to supervise (kind
            'enc').

        Raises:
            UserError: there are fewer tokens than proposals.
        """
        num_tokens = memory.tokens.shape[1]
        if not exporting() and num_tokens < num_proposals:
            raise UserError(
                f'{num_proposals} proposals, but the feature maps {memory.shapes} have {num_tokens} cells: lower '
                '--num_queries (or what training adds to it), or use larger images'
            )
        anchors, exists = default_boxes(memory)
        anchors = self.box_code.encode(anchors).masked_fill(~exists, self.box_code.no_box)
        features = self.norm(self.projection(memory.tokens.masked_fill(~exists, 0)))
        if self.by_class or training:
            logits = self.class_head(features)
            scores = logits.amax(-1) if self.by_class else logits[..., 0]
        else:  # no token needs logits of other classes
            scores = self.class_head.first(features)
        best = self.choose(scores, num_proposals)
        if training and not self.by_class:
            prediction = self.prediction(logits, features, anchors)
            return gather_rows(prediction.boxes[-1], best).detach(), prediction
        features, anchors = gather_rows(features, best), gather_rows(anchors, best)
        if not training:
            return self.box_code.decode(self.box_head(features), anchors), None
        prediction = self.prediction(gather_rows(logits, best), features, anchors)
        return prediction.boxes[-1].detach(), prediction

    def prediction(self, logits: Tensor, features: Tensor, anchors: Tensor) -> Prediction:
        boxes = self.box_code.decode(self.box_head(features), anchors)
        return Prediction(
            logits[None], boxes[None], self.box_code.decode(torch.zeros_like(anchors), anchors)[None]
        )


def default_boxes(memory: Memory) -> tuple[Tensor, Tensor]:
    """Return a box around every cell, [B, S, 4] cxcywh float32 in units of the image without padding, and a mask [B, S, 1].

    The mask is False in the padding, and where a coordinate is not between 0.01 and 0.99.
    """
    start, levels = 0, []
    for level, (height, width) in enumerate(memory.shapes):
        mask = memory.padding_mask[:, start : start + height * width].unflatten(1, (height, width))
        centers = cell_grid(height, width, mask.device) / valid_sizes(mask)[:, None]
        size = torch.full_like(centers, 0.05 * 2.0**level)
        levels.append(torch.cat([centers, size], dim=-1))
        start += height * width
    boxes = torch.cat(levels, dim=1)
    exists = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True) & ~memory.padding_mask[..., None]
    return boxes, exists
