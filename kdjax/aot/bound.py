"""Lower bounds on the time of a compiled step: products, memory, links, network."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kdjax.aot import compile, hlo
from kdjax.aot.compile import StepReport
from kdjax.config import Config
from kdjax.experiment.rows import flops_kwargs
from kdjax.models import flops, lm
from kdjax.models.lm import Shape
from kdjax.runtime import chips
from kdjax.training import program


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeBound:
    """Lower bounds on the time of a step, in seconds, one per resource."""

    compute: float  # FLOPs, recomputed ones included, at the peak rate
    hbm: float  # bytes written, each once written and once read
    links: float  # bytes sent over the links of a TPU, or a GPU's NVLink
    network: float = 0.0  # bytes sent between nodes

    @property
    def seconds(self) -> float:
        """The bound if all overlap perfectly."""
        return max(self.compute, self.hbm, self.links, self.network)


def model_flops(config: Config, shape: Shape) -> tuple[int, int]:
    """Return the useful and the recomputed FLOPs of a step, on all devices.

    Recomputing whole layers (remat="full") repeats their forward pass.
    """
    sizes = flops_kwargs(shape, config.train)
    _, params = lm.create(shape, adapters=config.student.lora)
    frozen_kwargs = program.frozen_params_kwargs(config, params)
    useful = flops.train_flops(shape, **sizes | frozen_kwargs)
    if config.train.remat != "full":
        return useful, 0
    return useful, flops.forward_flops(shape, **sizes | {"num_head_tokens": 0})


def time_bound(report: StepReport, chip: chips.Chip) -> TimeBound:
    """Return lower bounds on the time of a step on TPU chips or GPUs."""
    work = sum(model_flops(report.config, report.shape))
    seconds = [
        (trips * links, trips * network)
        for c in report.collectives
        for trips in [compile.num_trips(c, report)]
        for links, network in [link_seconds(c, chip, report.nodes)]
    ]
    return TimeBound(
        compute=work / report.num_devices / chip.peak,
        hbm=2 * report.written_bytes / chip.hbm_rate,
        links=sum(links for links, _ in seconds),
        network=sum(network for _, network in seconds),
    )


def link_seconds(
    collective: hlo.Collective, chip: chips.Chip, nodes: Sequence[int]
) -> tuple[float, float]:
    """Return the seconds on a device's links and on its network adapter, each run.

    Rings run through all devices of a group and enter and leave each node once. With M
    nodes and g devices on each, a device sends (g - 1) / g of its bytes over its links,
    and its adapter takes 1 / g of the (M - 1) / M that reach the node from others
    (twice that for an all-reduce).

    Args:
      collective: what is communicated.
      chip: rates.
      nodes: of each device.
    """
    members = Counter(nodes[device] for device in collective.group)
    num_nodes, sent = len(members), collective.wire_bytes
    if num_nodes <= 1 or not chip.network_rate:
        return sent / chip.link_rate, 0.0
    if collective.kind in hlo.SENT_WHOLE:
        return 0.0, sent / chip.network_rate
    on_node = collective.group_size / num_nodes
    times = 2 if collective.kind == "all-reduce" else 1
    received = times * collective.num_bytes * (1 - 1 / num_nodes)
    return (
        sent * (1 - 1 / on_node) / chip.link_rate,
        received / on_node / chip.network_rate,
    )
