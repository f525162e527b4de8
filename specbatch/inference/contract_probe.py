"""Verifies inside SGLang, in an engine's first prefills, that captured rows are what the contract names.

The first probe runs without graphs. While it runs, hooks in front of the layers after the captured ones record their
input: with the residual stream, it is the output of the layer before. The captured rows must equal it, and the states
after the final norm, times the head, must give the engine's own logits. The second probe has the same tokens and is
computed as all later prefills are, graphs included; its rows must be close to those of the first.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from specbatch.inference.capture_request import PROBE

TOLERANCE = 2.0**-6
"""Largest relative difference of a row in the first probe: both sums of a row are rounded once, or their parts come
from ranks in another order. Outputs of adjacent layers differ by more."""
NEAR = 0.1
"""Largest median of the rows' relative differences between the two probes, which may use other kernels, so that a
router may choose other experts for some tokens."""


class Unprovable(Exception):
    """The layers of a class can't be observed; the message says why."""


class LayerRecorder:
    """Records the inputs of layers in one prefill, and the states that the head was multiplied with.

    Args:
        model: SGLang's model.
        count: number of its decoder layers.
    """

    def __init__(self, model: torch.nn.Module, count: int) -> None:
        self.model, self.count = model, count
        self.outputs: dict[int, torch.Tensor] = {}
        """Outputs ``[rows, hidden]`` of each layer except the last."""
        self.head: torch.nn.Module | None = None
        self.problem: str | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> LayerRecorder:
        try:
            stack = decoder_layers(self.model, self.count)
            processor = _logits_processor(self.model)
        except Unprovable as error:
            self.problem = str(error)
            return self
        for layer in range(self.count - 1):
            before = self._keep_of(layer)
            self._handles.append(stack[layer + 1].register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(processor.register_forward_pre_hook(self._keep_head, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep_of(self, layer: int) -> Any:
        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            try:
                self.outputs[layer], args, kwargs = stream_of(module, args, kwargs)
            except Unprovable as error:
                self.problem = str(error)
            return args, kwargs

        return before

    def _keep_head(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.head = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("lm_head")


@contextlib.contextmanager
def without_graphs(runner: Any) -> Iterator[None]:
    """Make SGLang's ``ModelRunner`` compute prefills layer by layer."""
    graphs = runner.prefill_cuda_graph_runner
    runner.prefill_cuda_graph_runner = None
    try:
        yield
    finally:
        runner.prefill_cuda_graph_runner = graphs


class Proof:
    """Compares both probes; lives in the scheduler process of tensor-parallel rank 0.

    Args:
        layers: layers whose outputs are captured, ascending, from 0.
        name: name of the model's class, for messages.
    """

    def __init__(self, layers: Sequence[int], name: str) -> None:
        self.layers, self.name = tuple(layers), name
        self._truth: dict[int, torch.Tensor] = {}

    def hooked(self, watch: LayerRecorder, output: Any, rows: slice) -> str | None:
        """Return why the rows of the first probe are wrong; None if they are right.

        Args:
            output: SGLang's ``LogitsProcessorOutput``.
            rows: the probe's rows in its batch.
        """
        if watch.problem is not None:
            return f"what {self.name} captures can't be proved: {watch.problem}"
        captured = self._captured(output, rows)
        for layer in self.layers:
            if layer not in watch.outputs:
                return f"what {self.name} captures can't be proved: layer {layer + 1} was not called"
            self._truth[layer] = watch.outputs[layer][rows].clone()
            worst = _worst(captured[layer], self._truth[layer])
            if not worst <= TOLERANCE:
                meant = [i for i, states in watch.outputs.items() if _worst(captured[layer], states[rows]) <= TOLERANCE]
                return (
                    f"SGLang's {self.name} does not provide what layer {layer} passes to layer {layer + 1}: the "
                    f"relative difference is {worst:.2g}, and at most {TOLERANCE:.2g} is rounding"
                    + "".join(f"; it is the output of layer {other}" for other in meant[:1])
                )
        return self._last(watch, output, rows)

    def plain(self, output: Any, rows: slice) -> str | None:
        """Return the same for the second probe."""
        captured = self._captured(output, rows)
        for layer, truth in self._truth.items():
            middle = float(row_differences(captured[layer], truth).median())
            if not middle <= NEAR:
                return (
                    f"SGLang's {self.name} captures other states of layer {layer} with its graphs than without: the "
                    f"median of the rows' relative differences is {middle:.2g}, and at most {NEAR:g} is rounding; set "
                    "inference.sglang.disable_prefill_cuda_graph: true"
                )
        self._truth = {}
        return None

    def _captured(self, output: Any, rows: slice) -> dict[int, torch.Tensor]:
        parts = output.hidden_states[rows].chunk(len(self.layers), dim=1)
        return dict(zip(self.layers, parts, strict=True))

    def _last(self, watch: LayerRecorder, output: Any, rows: slice) -> str | None:
        weight = getattr(watch.head, "weight", None)
        logits = output.next_token_logits
        if weight is None or not weight.is_floating_point() or weight.element_size() < 2 or logits is None:
            return None  # a quantised head: nothing to multiply with
        last = output.last_hidden_states[rows][-1:]
        if last.shape[1] != weight.shape[1]:
            return f"SGLang's {self.name} has a head of {weight.shape[1]} columns for states of {last.shape[1]}"
        processor = _logits_processor(watch.model)
        mine = torch.nn.functional.linear(last.to(weight.dtype), weight, getattr(watch.head, "bias", None)).float()
        mine *= getattr(processor, "logit_scale", None) or 1.0
        if cap := getattr(processor, "final_logit_softcapping", None):
            mine = cap * torch.tanh(mine / cap)
        # The first rank has the vocabulary's first rows, and possibly padding.
        width = min(mine.shape[1], logits.shape[1])
        difference = _worst(mine[:, :width], logits[-1:, :width])
        if not difference <= 2 * TOLERANCE:
            return (
                f"SGLang's {self.name} does not provide the states that its head is multiplied with: their logits "
                f"differ from the engine's by {difference:.2g}, and at most {2 * TOLERANCE:.2g} is rounding"
            )
        return None


def probe_of(batch: Any) -> tuple[int, slice] | None:
    """Return the probe in a prefill (`capture_request.HOOKED` or `PLAIN`) and its rows; None if it has none."""
    start = 0
    for request, length in zip(batch.reqs, batch.extend_lens, strict=True):
        if str(request.rid).startswith(f"specbatch-{PROBE}-"):
            return int(str(request.rid).rpartition("-")[2]), slice(start, start + int(length))
        start += int(length)
    return None


def row_differences(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the difference of each row relative to the norm of the expected row, float32 ``[rows]``. Rows are compared
    separately, since some tokens' states are a thousand times larger than others' and hardly change between layers."""
    found, expected = found.float(), expected.float()
    return (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-12)


def _worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return row_differences(found.detach(), expected).max().item()


def decoder_layers(model: torch.nn.Module, count: int) -> torch.nn.ModuleList:
    """Return the decoder layers of an SGLang model: the list of ``count`` modules that take a ``forward_batch``.

    Raises:
        Unprovable: there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] == "layers" and len(module) == count:
            names = inspect.signature(module[0].forward).parameters
            if "hidden_states" in names and not any(part.startswith("vis") for part in name.split(".")):
                return module
    raise Unprovable(f"{type(model).__name__} has no list of its {count} decoder layers")


def stream_of(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return the input of a decoder layer, including the residual stream.

    SGLang's layers get either the whole state, or a contribution and, as another argument or with the batch, the
    residual that it has to be added to. Across ranks the contribution may not be summed yet; this is then done, as in
    SGLang's own capture.

    Returns:
        a separate tensor ``[rows, hidden]``; and the call's arguments, with the summed contribution.

    Raises:
        Unprovable: the two are not simply added.
    """
    bound = inspect.signature(layer.forward).bind_partial(*args, **kwargs)
    given = {**bound.kwargs, **bound.arguments}
    hidden, residual = given["hidden_states"], given.get("residual")
    stream = getattr(given.get("forward_batch"), "residual_stream", None)
    if stream is not None:
        if stream.pending is not None and not stream.pending.update.is_plain_add:
            raise Unprovable(f"{type(layer).__name__} does not simply add to the residual stream")
        complete, residual = stream.export(hidden)
        if complete is not hidden:
            hidden = complete
            if "hidden_states" in kwargs:
                kwargs = {**kwargs, "hidden_states": hidden}
            else:
                place = list(inspect.signature(layer.forward).parameters).index("hidden_states")
                args = (*args[:place], hidden, *args[place + 1 :])
    return (hidden.clone() if residual is None else hidden + residual), args, kwargs


def _logits_processor(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if type(module).__name__ == "LogitsProcessor":
            return module
    raise Unprovable(f"{type(model).__name__} has no LogitsProcessor")
