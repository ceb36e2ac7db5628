"""What a plan says: costs by stage and part, what to take, and all of it as a table."""

from dataclasses import asdict, dataclass
from typing import Any

from gc_accel.memory.retention import Retain
from gc_accel.planning.step import BytesByPart

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Plan:
    """What one step costs, on each of some devices. `print(plan)` shows it as a table.

    Args:
        batch_size: samples of one device.
        devices: number of processes, each with all weights.
        memory: bytes that one device has.
        chunk_size, retain: of this plan.
        bytes: by stage and by part.
        flops: by stage.
        sent: bytes that a device sends to others in a step, by what they are.
        suggested_chunk_size: the one to take, a power of two or the batch; 0 if not even one sample fits.
        suggested_retain: the one to take with it.
        suggested_peak: bytes at most with both.
    """

    batch_size: int
    devices: int
    memory: int
    chunk_size: int
    retain: Retain
    bytes: BytesByPart
    flops: dict[str, float]
    sent: dict[str, int]
    suggested_chunk_size: int
    suggested_retain: Retain
    suggested_peak: int

    @property
    def peak(self) -> int:
        """Bytes of one device at most."""
        return max(sum(parts.values()) for parts in self.bytes.values())

    @property
    def shares(self) -> dict[str, float]:
        """Share of each stage in the FLOPs, and so, where these decide, in the time."""
        return {stage: flops / sum(self.flops.values()) for stage, flops in self.flops.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything, for a file."""
        return asdict(self) | {"peak": self.peak, "shares": self.shares}

    def __str__(self) -> str:
        return table(self)


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    power = 0
    while nbytes >= 1024 and power < len(UNITS) - 1:
        nbytes, power = nbytes / 1024, power + 1
    return f"{nbytes:.0f} B" if power == 0 else f"{nbytes:,.1f} {UNITS[power]}"


def table(plan: Plan) -> str:
    """Memory by part and stage, work by stage, communication, and what to take."""
    each = f"on each of {plan.devices} devices" if plan.devices > 1 else "on one device"
    lines = [
        f"A step with {plan.batch_size:,} samples {each}, chunk_size={plan.chunk_size}, retain={plan.retain}",
        "",
    ]
    names = list(dict.fromkeys(part for parts in plan.bytes.values() for part in parts))
    rows = [["memory of a device", *plan.bytes]]
    for name in names:
        cells = [parts.get(name, 0) for parts in plan.bytes.values()]
        if any(cells):
            rows.append([name, *(size(cell) if cell else "" for cell in cells)])
    rows.append(["total", *(size(sum(parts.values())) for parts in plan.bytes.values())])
    rows.append(["TFLOP", *(f"{flops / 1e12:,.3f}" for flops in plan.flops.values())])
    rows.append(["share of the work", *(f"{share:.1%}" for share in plan.shares.values())])
    lines += aligned(rows)
    lines += ["", f"Peak: {size(plan.peak)} of {size(plan.memory)}"]
    if plan.devices > 1:
        sent = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in plan.sent.items() if nbytes)
        lines.append(f"Sent by each device in a step: {sent}")
    lines.append(suggestion(plan))
    return "\n".join(lines)


def suggestion(plan: Plan) -> str:
    """What to take, in one line."""
    peak = size(plan.suggested_peak)
    if plan.suggested_chunk_size == 0:
        return (
            f"Does not fit: a chunk of one sample needs {peak}. Turn on gradient checkpointing or freeze a part of "
            "the model"
        )
    return f"Suggested: chunk_size={plan.suggested_chunk_size}, retain={plan.suggested_retain} (peak {peak})"


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as columns of equal width, the first flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
