"""Which of DeepSpeed's operators a configuration builds or loads when its engine is made.

After DeepSpeed 0.19.8: who calls ``create_op_builder`` or an ``...Builder().load()``. Where a
setting leaves it open, the operator counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By every start, whatever it is configured to do: communication, pinned memory.
_ALWAYS = frozenset({"deepspeed_shm_comm", "deepspeed_ccl_comm", "pin_memory"})
_OPTIMIZERS = frozenset(
    {"cpu_adam", "fused_adam", "fused_lamb", "cpu_adagrad", "cpu_lion", "fused_lion"}
)
_QUANTIZED = ("weights", "nontrainable_weights", "gradients")


def operators_of(config: Mapping[str, Any], *, makes_optimizer: bool = False) -> frozenset[str]:
    """Return the folders' names of the operators that a start with `config` may wait for.

    Args:
        config: DeepSpeed's configuration.
        makes_optimizer: Whether the script has passed a function that makes the optimizer.
    """
    zero = _block(config, "zero_optimization")
    devices = [_block(zero, f"offload_{what}").get("device") for what in ("optimizer", "param")]
    is_offloaded = devices[0] not in (None, "none") or bool(zero.get("cpu_offload"))
    writer = bool(_block(config, "checkpoint").get("writer"))
    aio = _block(config, "aio")
    found = {
        "async_io": "nvme" in devices or writer,
        "gds": bool(aio.get("use_gds")),
        "utils": writer,
        "quantizer": any(zero.get(f"zero_quantized_{what}") for what in _QUANTIZED),
        "dc": bool(_block(config, "compile").get("deepcompile")),
        "random_ltd": "data_efficiency" in config,
        "fp_quantizer": "quantize_training" in config or "compression_training" in config,
    }
    wanted = {name for name, is_wanted in found.items() if is_wanted}
    optimizers = _OPTIMIZERS if makes_optimizer else _optimizers(config, is_offloaded=is_offloaded)
    return _ALWAYS | wanted | optimizers


def _optimizers(config: Mapping[str, Any], *, is_offloaded: bool) -> frozenset[str]:
    """Return those of the optimizer that DeepSpeed makes; one of the script's is made before."""
    block = _block(config, "optimizer")
    kind = str(block.get("type", "")).lower()
    own = "cpu_" if is_offloaded else "fused_"
    if "adam" in kind or kind == "muon":
        is_torchs = bool(_block(block, "params").get("torch_adam"))
        return frozenset() if is_torchs else frozenset({f"{own}adam"})
    return frozenset({f"{own}{kind}"}) & _OPTIMIZERS


def _block(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}
