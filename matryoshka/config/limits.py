"""Limits of numeric options that several programs share.

An option without an upper limit accepts 10**10 threads or a rate of 1e308, which end as a traceback
hours later, as a hang, or as weights that are not numbers. These limits are far beyond any sensible
value, and within what integers, clocks and float32 hold.
"""

from __future__ import annotations

MAX_COUNT = 2**31 - 1  # int32: rows, steps, images
MAX_EPOCHS = 1_000_000
MAX_BATCH = 2**24  # images, of one forward pass
MAX_DIM = 65_536  # numbers of an embedding or a layer
MAX_NESTING_START = 16  # 2^16 is MAX_DIM
MAX_SIDE = 16_384  # pixels, as the crops allow
MAX_SEED = 2**63 - 1  # torch's generators
MAX_THREADS = 1024  # of a native pool
MAX_PROCESSES = 1024  # on one machine
MAX_RATE = 1e4  # of learning; SGD diverges from about 10 on
MAX_DECAY = 1e3  # weight decay: rate x decay is below 1 where it does any good
MAX_WEIGHT = 1e6  # of a term of a loss: float32 keeps 7 digits of the others
MAX_ALPHA = 1e3  # of a Beta distribution: from there on, all draws are about 0.5
MIN_TEMPERATURE = 1e-3  # cosines / temperature stay below 1e3
MAX_TEMPERATURE = 1e3
MIN_RATIO = 0.01  # width / height of a crop
MAX_RATIO = 100.0
MAX_JITTER = 100.0  # a factor of brightness, contrast or saturation
MAX_SECONDS = 1e8  # three years; threads wait for at most 9e9
MAX_MINUTES = 1e6
