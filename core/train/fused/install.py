"""Put fused layers into a model and take them out again. The model stays what it was: modules, names and parameters are the
same objects, so saving, checkpoints, resuming and the optimiser know nothing of it.
"""

from collections.abc import Callable
from typing import Any

import torch

from core.models.families import FAMILIES, projections_of, why_not_fused
from core.train.fused.adapters import Adapters
from core.train.fused.elementwise import PLAIN, Elementwise
from core.train.fused.graphs import CudaRecorder, GraphedDecoder, Recorder
from core.train.fused.head import FusedHead
from core.train.fused.layer import FusedLayer
from core.train.fused.offload import HostStreams
from core.train.fused.projection import why_no_projection


def install_fused(model: Any, ops: Elementwise = PLAIN, *, offload: bool = False) -> str:
    """Replace the forward of every decoder layer, and the loss of a head that doesn't train.

    What is not a batch of packed rows still goes through a layer's own forward. Weights of layers that read one input become
    views of one matrix, group by group, so memory grows by one group while it happens and not at all in the end. `ops` are the
    element-wise functions, plain or kernels. Layers that were to be checkpointed make themselves again from then on; with
    `offload` the host keeps what they are made from. Returns what was done. Raises ValueError, with the reason, for a model
    that has no fused layers or has them already. Attention is not asked about: packed rows are the condition of all this
    (core.catalog.can_pack).
    """
    causal_lm = _causal_lm(model)
    if reason := _obstacle(causal_lm):
        raise ValueError(reason)
    layers = _layers(causal_lm)
    if any(fused_layer(layer) is not None for layer in layers):
        raise ValueError("the model's layers are fused already")
    host = HostStreams(causal_lm.device) if offload else None
    family = FAMILIES[causal_lm.config.model_type]
    adapters = Adapters()
    for number, layer in enumerate(layers):
        recomputed = layer.gradient_checkpointing
        where = host if recomputed else None
        layer.forward = FusedLayer(layer, family, ops, adapters, is_first=number == 0, recomputed=recomputed, host=where).forward
        layer.gradient_checkpointing = False
    adapters.join()
    head = causal_lm.get_output_embeddings()
    if type(head) is torch.nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        head.nats = FusedHead(head, ops).nats
    how = "plain" if ops is PLAIN else "kernels"
    return f"fused layers ({len(layers)} of {causal_lm.config.model_type}, element-wise functions {how})"


def install_graphs(model: Any, recorder: Callable[[torch.device], Recorder] = CudaRecorder) -> None:
    """Let fused layers run as graphs that are recorded once for each size of batch. Raises ValueError where none can be."""
    causal_lm = _causal_lm(model)
    fused = fused_layer(_layers(causal_lm)[-1])
    if fused is None or fused.host is not None:
        raise ValueError("the host takes part in its layers" if fused else "the model's layers are not fused")
    decoder = causal_lm.get_decoder()
    decoder.forward = GraphedDecoder(decoder, fused, recorder, causal_lm.device).forward


def uninstall_graphs(model: Any) -> None:
    """Put the decoder's own forward back. Harmless where nothing was installed."""
    vars(_causal_lm(model).get_decoder()).pop("forward", None)


def forget_graphs(model: Any) -> None:
    """To be said when layers are to compute something else than what was recorded. Harmless where nothing was installed."""
    forward = vars(_causal_lm(model).get_decoder()).get("forward")
    graphed = getattr(forward, "__self__", None)
    if isinstance(graphed, GraphedDecoder):
        graphed.drop()


def uninstall_fused(model: Any) -> None:
    """Put every layer's own forward back and give its weights memory of their own. Harmless where nothing was installed."""
    uninstall_graphs(model)
    if (first := fused_layer(_layers(_causal_lm(model))[0])) is not None:
        first.adapters.part()
    vars(_causal_lm(model).get_output_embeddings()).pop("nats", None)
    for layer in _layers(_causal_lm(model)):
        fused = fused_layer(layer)
        if fused is not None:
            del layer.forward
            layer.gradient_checkpointing = fused.recomputed
            fused.part()


def weights_changed(model: Any) -> None:
    """To be said after a step of an optimizer: not all of them write so that torch notices."""
    for fused in filter(None, map(fused_layer, _layers(_causal_lm(model))[:1])):
        fused.adapters.changed()


def fused_layer(layer: Any) -> FusedLayer | None:
    """What stands in a decoder layer's place; None where nothing does."""
    forward = vars(layer).get("forward")
    found = getattr(forward, "__self__", None)
    return found if isinstance(found, FusedLayer) else None


def _obstacle(causal_lm: Any) -> str | None:
    if reason := why_not_fused(causal_lm):
        return reason
    for layer in _layers(causal_lm):
        if "forward" in vars(layer) and fused_layer(layer) is None:
            return "something else stands in its layers' place"
        for group in projections_of(layer, FAMILIES[causal_lm.config.model_type]):
            if reason := why_no_projection(group):
                return reason
    return None


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _layers(causal_lm: Any) -> list[Any]:
    return list(causal_lm.get_decoder().layers)
