"""What a step is built of: chunks that are encoded now and again later, their schedule, BatchNorm, transfer."""
