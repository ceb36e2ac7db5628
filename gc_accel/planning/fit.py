"""From two measured peaks to the largest chunk that fits: peak memory is a straight line over the chunk."""


def largest_chunk(small: tuple[int, float], large: tuple[int, float], memory: float) -> int:
    """The largest chunk whose peak stays within `memory`.

    Args:
        small, large: a chunk size and the peak that was measured with it, in bytes, or whatever unit `memory` is in.
            Take them as large as is cheap: for a few samples, what the weights need can hide what the samples do.
        memory: bytes that may be used.

    Raises:
        ValueError: the peaks do not grow with the chunk; not even one sample fits.
    """
    (few, low), (many, high) = small, large
    if not 0 < few < many or high <= low:
        raise ValueError(
            f"expected a larger peak for a larger chunk, got {small} and {large}: measure larger ones"
        )
    per_sample = (high - low) / (many - few)
    chunk = int(few + (memory - low) // per_sample)
    if chunk < 1:
        raise ValueError(
            f"expected memory for a chunk of one sample, got {memory:,.0f} where it takes "
            f"{low - (few - 1) * per_sample:,.0f}: turn on gradient checkpointing, or freeze a part of the model"
        )
    return chunk
