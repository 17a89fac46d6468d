"""The whole numbers in which `sample` counts probability, on every device the same.

A token's steps say how far its probability lies below the largest of its row; its weight is made from them by
whole-number arithmetic, so that sums of weights are exact in any order.
"""

CHUNK = 2048  # tokens a program takes: 8 a thread, so that two programs and more fit a multiprocessor's registers
BINS = 2048  # of the histogram, of 1/32 octave
LIST = 2048  # candidates around a row's cut that are held in registers
COPIES = 8  # of a histogram, at most: a single row's atomics would queue for its fullest bins
ID_BITS = 18  # of a token id, in a rank
STEP_BITS = 25  # of a step, below the octave
BIN_BITS = 20  # of a step, below the bin
OCTAVES = 63.5  # what lies further below is taken to be there; from 40 octaves on a weight is 0
# 2^-f = 1 - f (c1 - f (c2 - f (c3 - f (c4 - f c5)))) for f in [0, 1), within 2^-23; in units of 2^-31.
POLYNOMIAL = (1488514807, 515782929, 118750172, 19769301, 2029165)
MANTISSA_BITS = 26
WEIGHT_SHIFT = 14
PEAK_WEIGHT = ((1 << MANTISSA_BITS) - 1) << WEIGHT_SHIFT  # 2^18 of these are less than 2^63
LOG2_E = 1.4426950408889634
LARGEST = 3.4028234663852886e38  # of float32
GREEDY_BELOW = 1e-5  # at such temperatures the most probable token is taken
MAX_COUNT = 2**14 - 1  # of one token in an answer: counting stops there
IN_PROMPT = 2**14  # the bit of a count that says: the prompt has this token
STATE = 5  # words that `cut_kernel` leaves for a row
NOTHING = 1 << 62  # above every rank
