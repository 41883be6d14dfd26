"""Device code: one token from a row of logits by temperature, top-k, top-p and a number in [0, 1), without a sort.

Both limits keep the scores above a threshold. It is found by bisection over the 2^31 bit patterns a score may have,
each step one pass over the row's scores, which lie in the cache.
"""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl


@triton.jit
def sortable(score):
    """Integers in the order of scores, none of which is above 0; equal scores get equal integers."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # the sum makes one zero of two
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def load_scores(scores_ptr, at, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of `BLOCK` tokens, 0 at most; minus infinity behind the vocabulary."""
    tokens = at + tl.arange(0, BLOCK)
    return tokens, tl.load(scores_ptr + tokens, mask=tokens < VOCAB, other=float("-inf"))


@triton.jit
def sum_above(scores_ptr, threshold, VOCAB: tl.constexpr, BLOCK: tl.constexpr, COUNTS: tl.constexpr):
    """Tokens whose integer is above the threshold: how many, or the sum of their unscaled probabilities."""
    found = tl.zeros([BLOCK], dtype=tl.int32 if COUNTS else tl.float64)
    for at in range(0, VOCAB, BLOCK):
        tokens, scores = load_scores(scores_ptr, at, VOCAB, BLOCK)
        is_above = (sortable(scores) > threshold) & (tokens < VOCAB)
        if COUNTS:
            found += is_above.to(tl.int32)
        else:
            found += tl.where(is_above, tl.exp(scores), 0.0).to(tl.float64)
    return tl.sum(found, 0)


@triton.jit
def lowest_kept(scores_ptr, low, limit, VOCAB: tl.constexpr, BLOCK: tl.constexpr, COUNTS: tl.constexpr):
    """The least integer, from `low` on, above which there is less than `limit`: that of the last score kept.

    Of counts it may be a lesser one that tells those kept from the others as well.
    """
    high = low * 0
    while low < high:
        middle = low + (high - low) // 2
        found = sum_above(scores_ptr, middle, VOCAB, BLOCK, COUNTS)
        if found < limit:
            high = middle
        else:
            low = middle + 1
        if COUNTS:
            high = tl.where(found == limit, low, high)  # then the scores above the middle are those to keep
    return low


@triton.jit
def sample_kernel(
    ids_ptr,  # int64 [num_rows]
    scores_ptr,  # float32 [num_rows, VOCAB], written before it is read
    logits_ptr,  # [num_rows, VOCAB]
    temperatures_ptr,  # float32 or float64 [num_rows], 0: the likeliest
    top_ks_ptr,  # int32 or float64 [num_rows], below 1 or from VOCAB on: all
    top_ps_ptr,  # float64 [num_rows], from 1 on: all
    uniforms_ptr,  # float64 [num_rows]
    row_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    scores_ptr += row * VOCAB
    temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    top_k = tl.load(top_ks_ptr + row).to(tl.int32)
    top_p = tl.load(top_ps_ptr + row)
    uniform = tl.load(uniforms_ptr + row)
    if temperature == 0.0:  # the first of the likeliest
        temperature = temperature + 1.0
        top_k = top_k * 0 + 1
        top_p = top_p * 0.0 + 1.0
        uniform = uniform * 0.0

    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for at in range(0, VOCAB, BLOCK):
        tokens = at + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + tokens, mask=tokens < VOCAB, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, logits)
    peak = tl.max(largest, 0)
    for at in range(0, VOCAB, BLOCK):
        tokens = at + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + tokens, mask=tokens < VOCAB, other=float("-inf")).to(tl.float32)
        tl.store(scores_ptr + tokens, (logits - peak) / temperature, mask=tokens < VOCAB)
    tl.debug_barrier()

    kept_from = top_k * 0 - 2139095041  # minus infinity's
    if (top_k > 0) & (top_k < VOCAB):
        kept_from = lowest_kept(scores_ptr, kept_from, top_k, VOCAB, BLOCK, True)
    total = sum_above(scores_ptr, kept_from - 1, VOCAB, BLOCK, False)
    num_equal = top_k * 0 + VOCAB  # how many of the scores at the threshold are kept, the first ones
    if top_p < 1.0:
        limit = top_p * total
        kept_from = lowest_kept(scores_ptr, kept_from, limit, VOCAB, BLOCK, False)
        above = sum_above(scores_ptr, kept_from, VOCAB, BLOCK, False)
        with_equal = sum_above(scores_ptr, kept_from - 1, VOCAB, BLOCK, False)
        bits = tl.where(kept_from < 0, kept_from ^ 0x7FFFFFFF, kept_from)
        each = tl.exp(bits.to(tl.float32, bitcast=True)).to(tl.float64)
        # Kept as long as the sum of what stands before is below the limit; never none.
        wanted = tl.minimum((limit - above) / tl.maximum(each, 1e-300), 1.0 * VOCAB)
        num_equal = tl.maximum(tl.ceil(wanted.to(tl.float32)).to(tl.int32), 1)
        total = tl.minimum(above + num_equal * each, with_equal)

    target = uniform * total
    before = total * 0.0  # probability of the blocks so far
    equal_before = num_equal * 0
    chosen = num_equal * 0 + VOCAB
    last = num_equal * 0
    for at in range(0, VOCAB, BLOCK):
        tokens, scores = load_scores(scores_ptr, at, VOCAB, BLOCK)
        keys = sortable(scores)
        is_equal = ((keys == kept_from) & (tokens < VOCAB)).to(tl.int32)
        rank = tl.cumsum(is_equal, 0) + equal_before
        is_kept = ((keys > kept_from) | ((is_equal > 0) & (rank <= num_equal))) & (tokens < VOCAB)
        probs = tl.where(is_kept, tl.exp(scores), 0.0).to(tl.float64)
        cumulative = tl.cumsum(probs, 0) + before
        is_past = (cumulative > target) & (probs > 0.0)
        chosen = tl.minimum(chosen, tl.min(tl.where(is_past, tokens, VOCAB), 0))
        last = tl.maximum(last, tl.max(tl.where(probs > 0.0, tokens, 0), 0))
        before += tl.sum(probs, 0)
        equal_before += tl.sum(is_equal, 0)
    # The number may come to lie on the far side of the last sum by rounding.
    tl.store(ids_ptr + row, tl.minimum(chosen, last).to(tl.int64))
