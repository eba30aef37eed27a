"""What RF-DETR is made of, in `transformers` and in the package `rfdetr`: backbone, projector, decoder.

It refers to the network's own modules and owns no parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eventful_det.data.classes import COCO_NAMES
from eventful_det.errors import UserError

_COCO_GAPS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # ids up to 90 that COCO does not use
_SUPPORTED = "transformers RfDetrForObjectDetection, rfdetr RFDETRNano ... RFDETRLarge, or the LWDETR in them"


@dataclass(frozen=True)
class ConvNorm:
    """A convolution without bias, and the token-wise norm and activation after it, on `(n, C)`."""

    conv: nn.Conv2d
    after: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Projector:
    """1x1 convolution, split in halves, pairs of 3x3 convolutions on the second half, 1x1 convolution of all.

    Attributes:
        first: 1x1, of all feature maps.
        inner: 3x3, one after another.
        last: 1x1, of the two halves and the result of every second of `inner`.
        norm: of the result, on `(n, C)`.
    """

    first: ConvNorm
    inner: tuple[ConvNorm, ...]
    last: ConvNorm
    norm: Callable[[Tensor], Tensor]

    @property
    def hidden(self) -> int:
        """Channels of a half."""
        return self.first.conv.out_channels // 2


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that the cost of the decoder depends on.

    Attributes:
        layers: MACs of the linear layers of all decoder layers for one query, and of the head of reference points.
        values: MACs of the value projections of all decoder layers for one token.
        attention: MACs of the self-attention of all layers for a pair of queries.
        proposals: MACs for one token before queries are selected.
        selected: MACs for one query after.
        queries: object queries.
    """

    layers: int
    values: int
    attention: int
    proposals: int
    selected: int
    queries: int

    def macs(self, tokens: int) -> int:
        """MACs of the decoder over a feature map of so many tokens."""
        each = self.layers + self.selected
        return tokens * (self.values + self.proposals) + self.queries * (each + self.queries * self.attention)


@dataclass(frozen=True)
class Parts:
    """An RF-DETR.

    Attributes:
        backbone: that `eventify` knows.
        projector: from feature maps to the decoder's map.
        decode: from the map `(1, C, H, W)` to logits `(1, Q, K)` and boxes `(1, Q, 4)`: centre and size, 0 to 1.
        decoder: its sizes.
        names: of the classes.
        side: of the square input in pixels.
        mean, std: of RGB in [0, 1].
        reciprocal: whether pixels are multiplied by 1 / 255 rather than divided by 255.
        clamped: whether boxes end at the borders of the frame.
    """

    backbone: nn.Module
    projector: Projector
    decode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decoder: DecoderShape
    names: tuple[str, ...]
    side: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    reciprocal: bool = False
    clamped: bool = False


def parts_of(model: object) -> tuple[nn.Module, Parts]:
    """The network in a model, and its parts.

    Raises:
        UserError: it is no RF-DETR that finds boxes, or has a part that is not supported.
    """
    names: tuple[str, ...] | None = None
    side, network = None, cast(Any, model)
    for base in type(model).__mro__:
        if base.__module__.startswith("rfdetr.") and base.__name__ == "RFDETR":
            names, side = _rfdetr_names(model), network.model.resolution
            network = network.model.model
            break
    name, module = type(network).__name__, type(network).__module__
    if name == "RfDetrForInstanceSegmentation":
        raise UserError(
            "RF-DETR for segmentation is not supported: masks are not carried; use RfDetrForObjectDetection"
        )
    if name == "RfDetrForObjectDetection":
        return network, _hugging_face(network)
    if module.startswith("rfdetr.") and name == "LWDETR":
        return network, _rfdetr(network, names, side)
    raise UserError(f"cannot make {module}.{name} an eventful RF-DETR; supported: {_SUPPORTED}")


def coco_names(count: int) -> tuple[str, ...]:
    """Names of classes that are COCO's ids, 0 to 90, gaps included; fewer classes are others, and have no names."""
    if count < 90:
        return tuple(f"class {i}" for i in range(count))
    names = iter(COCO_NAMES)
    return tuple(f"unused {i}" if i in _COCO_GAPS or i > 90 else next(names) for i in range(count))


def _hugging_face(model: Any) -> Parts:
    config, net = model.config, model.model
    backbone, projector = net.backbone.backbone, net.backbone.projector
    layer = projector.projector_layer
    inner = tuple(_conv_norm(c.conv, c.norm, c.activation) for b in layer.bottlenecks for c in (b.conv1, b.conv2))
    labels = [config.id2label[i] for i in range(config.num_labels)]
    unnamed = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    vit = config.backbone_config
    trained = vit.image_size if isinstance(vit.image_size, int) else vit.image_size[0]
    step = vit.patch_size * vit.num_windows
    return Parts(
        backbone=backbone,
        projector=Projector(
            first=_conv_norm(layer.conv1.conv, layer.conv1.norm, layer.conv1.activation),
            inner=inner,
            last=_conv_norm(layer.conv2.conv, layer.conv2.norm, layer.conv2.activation),
            norm=partial(_layer_norm, projector.layer_norm),
        ),
        decode=partial(_decode_hugging_face, model),
        decoder=_decoder_shape(
            layers=net.decoder.layers,
            head=net.decoder.ref_point_head,
            before=[net.enc_output[0], net.enc_out_class_embed[0], net.enc_out_bbox_embed[0]],
            after=[model.class_embed, model.bbox_embed],
            queries=config.num_queries,
            width=config.d_model,
        ),
        names=_unique(coco_names(len(labels)) if unnamed else labels),
        side=-(-trained // step) * step,  # "base" has position encodings for 518 pixels, which are no whole windows
        reciprocal=True,
    )


def _rfdetr(model: Any, names: tuple[str, ...] | None, side: int | None) -> Parts:
    if model.segmentation_head is not None or model.use_grouppose_keypoints:
        raise UserError("RF-DETR for segmentation or keypoints is not supported; use one that finds boxes")
    joined, net = model.backbone[0], model.transformer
    if len(joined.projector.stages) != 1 or joined.projector_scale != ["P4"] or joined.cross_attn_projector is not None:
        raise UserError(f"RF-DETR with a projector of scales {joined.projector_scale} is not supported; only P4 is")
    if not (model.two_stage and model.bbox_reparam and model.lite_refpoint_refine):
        raise UserError("RF-DETR without two stages and refined boxes is not supported")
    c2f, norm = joined.projector.stages[0]
    inner = tuple(_conv_norm(c.conv, c.bn, c.act) for b in c2f.m for c in (b.cv1, b.cv2))
    if any(b.add for b in c2f.m):
        raise UserError("RF-DETR with shortcuts in its projector is not supported")
    config = joined.encoder.encoder.config
    grid = int((joined.encoder.encoder.embeddings.position_embeddings.shape[1] - 1) ** 0.5)
    return Parts(
        backbone=joined.encoder.encoder,
        projector=Projector(
            first=_conv_norm(c2f.cv1.conv, c2f.cv1.bn, c2f.cv1.act),
            inner=inner,
            last=_conv_norm(c2f.cv2.conv, c2f.cv2.bn, c2f.cv2.act),
            norm=partial(_layer_norm, norm),
        ),
        decode=partial(_decode_rfdetr, model),
        decoder=_decoder_shape(
            layers=net.decoder.layers,
            head=net.decoder.ref_point_head,
            before=[net.enc_output[0], net.enc_out_class_embed[0]],
            after=[model.class_embed, model.bbox_embed, net.enc_out_bbox_embed[0]],
            queries=model.num_queries,
            width=net.d_model,
        ),
        names=coco_names(model.class_embed.out_features) if names is None else names,
        side=grid * config.patch_size if side is None else side,
        clamped=True,
    )


def _rfdetr_names(model: Any) -> tuple[str, ...]:
    """Names by class index: COCO's ids for the published weights, else in the order of the training data."""
    count, given = model.model.model.class_embed.out_features, list(model.class_names)
    if given == list(COCO_NAMES) and count not in (len(given), len(given) + 1):
        return coco_names(count)
    return _unique([*given, *(f"unused {i}" for i in range(len(given), count))][:count])


def _unique(names: Any) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    unique = []
    for i, name in enumerate(names):
        unique.append(f"{name} {i}" if name in seen else str(name))
        seen[name] = i
    return tuple(unique)


def _conv_norm(conv: nn.Conv2d, norm: Any, activation: Any) -> ConvNorm:
    if not hasattr(norm, "normalized_shape"):
        raise UserError(f"RF-DETR with {type(norm).__name__} in its projector is not supported; only layer norms are")
    return ConvNorm(conv, partial(_norm_activation, norm, activation))


def _layer_norm(norm: Any, x: Tensor) -> Tensor:
    """Both packages norm the channels of maps; here they are the last."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _norm_activation(norm: Any, activation: Any, x: Tensor) -> Tensor:
    result: Tensor = activation(_layer_norm(norm, x))
    return result


class Float32Sampling(TorchFunctionMode):
    """Maps are sampled in float32: in low precision PyTorch's CPU gives NaN, and places are blurred by half a cell."""

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[Tensor, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Tensor:
        if func is F.grid_sample:
            return func(args[0].float(), args[1].float(), *args[2:], **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _decode_hugging_face(model: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """`RfDetrModel.forward` after its backbone, for frames without padding."""
    net, config = model.model, model.config
    source = features.flatten(2).transpose(1, 2)  # (1, N, C)
    seen = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
    sizes = [features.shape[2:]]
    queries, proposals, invalid = net.gen_encoder_output_proposals(source, ~seen, sizes)
    count = min(config.num_queries, source.shape[1])  # as the package rfdetr does on small frames
    _, boxes, _ = net.generate_topk_proposals(0, queries, proposals, invalid, count)
    points = net.reference_point_embed.weight[None, : config.num_queries]
    reference = torch.cat([_refine(points[:, :count], boxes), points[:, count:]], 1)
    decoded = net.decoder(
        inputs_embeds=net.query_feat.weight[None, : config.num_queries],
        reference_points=reference,
        spatial_shapes=torch.tensor([list(size) for size in sizes], device=source.device),
        spatial_shapes_list=sizes,
        level_start_index=torch.zeros(1, dtype=torch.long, device=source.device),
        valid_ratios=source.new_ones(1, 1, 2),
        encoder_hidden_states=source,
        encoder_attention_mask=seen,
    )
    logits, boxes = model.predict_class_and_boxes(decoded.last_hidden_state, decoded.intermediate_reference_points[-1])
    return logits, boxes


def _refine(delta: Tensor, boxes: Tensor) -> Tensor:
    """Boxes moved and scaled by deltas, `(1, Q, 4)`."""
    return torch.cat([delta[..., :2] * boxes[..., 2:] + boxes[..., :2], delta[..., 2:].exp() * boxes[..., 2:]], -1)


def _decode_rfdetr(model: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """`LWDETR.forward` after its backbone, for frames without padding; position encodings are not used there."""
    mask = torch.zeros(1, *features.shape[2:], dtype=torch.bool, device=features.device)
    points, queries = (x.weight[: model.num_queries] for x in (model.refpoint_embed, model.query_feat))
    states, reference, *_ = model.transformer([features], [mask], [torch.zeros_like(features)], points, queries)
    return model.class_embed(states[-1]), _refine(model.bbox_embed(states[-1]), reference[-1])


def _decoder_shape(
    layers: Any, head: nn.Module, before: list[nn.Module], after: list[nn.Module], queries: int, width: int
) -> DecoderShape:
    values = sum(layer.cross_attn.value_proj.weight.numel() for layer in layers)
    return DecoderShape(
        layers=_matrices(layers) - values + _matrices(head),
        values=values,
        attention=2 * width * len(layers),
        proposals=sum(map(_matrices, before)),
        selected=sum(map(_matrices, after)),
        queries=queries,
    )


def _matrices(module: nn.Module) -> int:
    """Weights of linear layers, those inside attention included."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
