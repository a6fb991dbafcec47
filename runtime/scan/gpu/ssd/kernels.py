"""The Triton kernels of Mamba-2's scan: what one program of a grid computes; `prefill` and `decode` launch them.

A program walks over a stretch of time of one head (or a block of its channels), TOKENS at a time, and keeps the state
(P, N) in registers. Within such a chunk the recurrence is written out as matrix products (Mamba-2, section 6), which
run on tensor cores: operands in the tensors' precision, sums in float32. N is cut into at most two tiles whose sides
are powers of two, so that 96 states cost 64 + 32 and not 128.

What is multiplied: bfloat16 as it is. A product of float16 numbers may not be one of float16 again, so there the
operands that are products are TF32, which has float16's digits and float32's range. float32 in three TF32 parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmc.runtime.scan.gpu.kernels import LOG2_E, silu, softplus

NOTHING = tl.constexpr(-160.0)  # 2^-160 is 0 in float32
BFLOAT16, TF32, EXACT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # MODE: what tensor cores multiply


@triton.jit
def operand(x, MODE: tl.constexpr):
    """Numbers as tensor cores read them."""
    return x.to(tl.bfloat16 if MODE == BFLOAT16 else tl.float32)


@triton.jit
def product(a, b, MODE: tl.constexpr):
    """a @ b with sums in float32."""
    return tl.dot(a, b, input_precision="tf32x3" if MODE == EXACT else "tf32")


@triton.jit
def added(a, b, sums, MODE: tl.constexpr):
    """sums + a @ b, in float32."""
    return tl.dot(a, b, sums, input_precision="tf32x3" if MODE == EXACT else "tf32")


@triton.jit
def rate_of(A):
    """The exponent of a unit of time to the base of 2; finite, so that no time is no exponent."""
    return tl.maximum(A * LOG2_E, -1e30)


@triton.jit
def running_sums(exponents, MODE: tl.constexpr):
    """Sums up to each token, what float32 does not hold of them, the sum of all, and sums from behind each token.

    Differences of long sums are what counts; in half precision they are exact enough. Less than `NOTHING` is left of
    what decays by more: cut there, no sum is infinite.
    """
    exponents = tl.maximum(exponents, NOTHING)
    if MODE == EXACT:
        exponents = exponents.to(tl.float64)
    sums = tl.cumsum(exponents, 0)
    total = tl.sum(exponents, 0)
    high = sums.to(tl.float32)
    return high, (sums - high).to(tl.float32), total.to(tl.float32), (total - sums).to(tl.float32)


@triton.jit
def decay_between(sums, rest, t, MODE: tl.constexpr):
    """What remains of token s at token t, (t, s); 0 where s > t."""
    lag = sums[:, None] - sums[None, :]
    if MODE == EXACT:
        lag += rest[:, None] - rest[None, :]
    return tl.exp2(tl.where(t[:, None] >= t[None, :], lag, -float("inf")))


@triton.jit
def weigh(pairs, sums, rest, columns, t, MODE: tl.constexpr):
    """What token s drives times what remains of it at token t, as `steps_kernel` prepares it, times `pairs` (t, s)."""
    if MODE == EXACT:
        pairs *= decay_between(sums, rest, t, MODE) * columns[None, :]
    else:
        pairs *= tl.exp2(tl.where(t[:, None] >= t[None, :], sums[:, None] - columns[None, :], -float("inf")))
    return pairs


@triton.jit
def load_rows(ptr, token, t, inside, first, states: tl.constexpr, PART: tl.constexpr):
    """A tile of B or C, (TOKENS, PART)."""
    n = first + tl.arange(0, PART)
    return tl.load(ptr + t[:, None] * token + n[None, :], mask=inside[:, None] & (n < states)[None, :], other=0.0)


@triton.jit
def load_state(ptr, p, head_dim: tl.constexpr, first, states: tl.constexpr, PART: tl.constexpr):
    """A tile of a state (P, N), (BLOCK, PART)."""
    n = first + tl.arange(0, PART)
    wanted = (p < head_dim)[:, None] & (n < states)[None, :]
    return tl.load(ptr + p[:, None] * states + n[None, :], mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def store_state(ptr, p, head_dim: tl.constexpr, first, states: tl.constexpr, value, PART: tl.constexpr):
    """Store what `load_state` loads."""
    n = first + tl.arange(0, PART)
    wanted = (p < head_dim)[:, None] & (n < states)[None, :]
    tl.store(ptr + p[:, None] * states + n[None, :], value, mask=wanted)


@triton.jit
def load_states(ptr, p, head_dim: tl.constexpr, states: tl.constexpr, PARTS: tl.constexpr):
    """A state as a tuple of tiles (BLOCK, PARTS[i])."""
    tiles = ()
    first = 0
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (load_state(ptr, p, head_dim, first, states, PARTS[i]),)
        first += PARTS[i]
    return tiles


@triton.jit
def store_states(ptr, p, head_dim: tl.constexpr, states: tl.constexpr, tiles, PARTS: tl.constexpr):
    """Store what `load_states` loads."""
    first = 0
    for i in tl.static_range(len(PARTS)):
        store_state(ptr, p, head_dim, first, states, tiles[i], PARTS[i])
        first += PARTS[i]


@triton.jit
def zero_state(BLOCK: tl.constexpr, PART: tl.constexpr):
    """(BLOCK, PART) zeros."""
    return tl.zeros((BLOCK, PART), tl.float32)


@triton.jit
def zero_states(BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """A tuple of zero tiles (BLOCK, PARTS[i])."""
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (zero_state(BLOCK, PARTS[i]),)
    return tiles


@triton.jit
def load_all_rows(ptr, token, t, inside, states: tl.constexpr, PARTS: tl.constexpr):
    """B or C of a chunk as a tuple of tiles (TOKENS, PARTS[i])."""
    tiles = ()
    first = 0
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (load_rows(ptr, token, t, inside, first, states, PARTS[i]),)
        first += PARTS[i]
    return tiles


@triton.jit
def advance(h, u, B, kept, total, PARTS: tl.constexpr, MODE: tl.constexpr):
    """The state a chunk later; `kept` is what its tokens drive, times what remains of that at its end, `total` log2."""
    drive = tl.trans(operand(u.to(tl.float32) * kept[:, None], MODE))  # (BLOCK, TOKENS)
    after = ()
    for i in tl.static_range(len(PARTS)):
        after = after + (added(drive, operand(B[i], MODE), tl.exp2(total) * h[i], MODE),)
    return after


@triton.jit
def pairs_of(C, B, PARTS: tl.constexpr, MODE: tl.constexpr):
    """C_t B_s' of all pairs of tokens, (t, s)."""
    pairs = product(operand(C[0], MODE), tl.trans(operand(B[0], MODE)), MODE)
    for i in tl.static_range(1, len(PARTS)):
        pairs = added(operand(C[i], MODE), tl.trans(operand(B[i], MODE)), pairs, MODE)
    return pairs


@triton.jit
def read_state(C, h, PARTS: tl.constexpr, MODE: tl.constexpr):
    """C_t h' of the state before the chunk, (TOKENS, BLOCK)."""
    y = product(operand(C[0], MODE), tl.trans(operand(h[0], MODE)), MODE)
    for i in tl.static_range(1, len(PARTS)):
        y = added(operand(C[i], MODE), tl.trans(operand(h[i], MODE)), y, MODE)
    return y


@triton.jit
def carry(
    h,
    ends_ptr,
    totals_ptr,
    count,
    step,
    total_step,
    p,
    head_dim: tl.constexpr,
    states: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The state after `count` stretches, from what each made of a zero state and the logarithm of its decay."""
    for _ in tl.range(0, count, num_stages=2):
        decay = tl.exp2(tl.load(totals_ptr))
        ends = load_states(ends_ptr, p, head_dim, states, PARTS)
        after = ()
        for i in tl.static_range(len(PARTS)):
            after = after + (decay * h[i] + ends[i],)
        h = after
        ends_ptr += step
        totals_ptr += total_step
    return h


@triton.jit(do_not_specialize=["length", "heads"])
def steps_kernel(
    dt_ptr,
    dt_batch,
    dt_token,
    A_ptr,
    bias_ptr,
    columns_ptr,
    sums_ptr,
    rest_ptr,
    kept_ptr,
    length,
    heads,
    low,
    high,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    MODE: tl.constexpr,
):
    """What the scan wants to know of the time steps of a chunk, so that nothing in its loop waits for it.

    Grid (chunks, blocks of H, sequences). All (B, H, chunks x TOKENS) float32, without effect behind the last token:
    the sums of `running_sums` and what they lack; `kept`, time steps times what is left at the end of the chunk; and
    `columns`, the time steps or, in half precision, the sums without the logarithms of the time steps, which saves a
    product for every pair of tokens.
    """
    head, row = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = head < heads
    inside = (t < length)[:, None] & here[None, :]
    at = row * dt_batch + t.to(tl.int64)[:, None] * dt_token + head[None, :]
    steps = tl.load(dt_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SOFTPLUS:
        steps = softplus(steps + tl.load(bias_ptr + head, mask=here, other=0.0).to(tl.float32)[None, :])
    if LIMITED:
        steps = tl.minimum(tl.maximum(steps, low), high)
    steps = tl.where(inside, steps, 0.0)
    rates = rate_of(tl.load(A_ptr + head, mask=here, other=0.0))
    sums, rest, _total, to_end = running_sums(steps * rates[None, :], MODE)
    at = (row * heads + head)[None, :] * (tl.num_programs(0) * TOKENS) + t[:, None]
    tl.store(sums_ptr + at, sums, mask=here[None, :])
    tl.store(kept_ptr + at, steps * tl.exp2(to_end), mask=here[None, :])
    if MODE == EXACT:
        tl.store(columns_ptr + at, steps, mask=here[None, :])
        tl.store(rest_ptr + at, rest, mask=here[None, :])
    else:
        tl.store(columns_ptr + at, sums - tl.log2(tl.maximum(steps, 1e-38)), mask=here[None, :])


@triton.jit(do_not_specialize=["length", "stretch", "heads", "per_group"])
def ends_kernel(
    u_ptr,
    u_batch,
    u_token,
    sums_ptr,
    kept_ptr,
    B_ptr,
    B_batch,
    B_token,
    B_group,
    ends_ptr,
    totals_ptr,
    length,
    stretch,
    heads,
    per_group,
    head_dim: tl.constexpr,
    states: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    MODE: tl.constexpr,
):
    """What each stretch but the last makes of a zero state, and the logarithm (base 2) of its decay.

    Grid (H x blocks of P, stretches - 1, sequences). `ends` (B, stretches - 1, H, P, N), `totals` (B, stretches - 1,
    H). `stretch` is a multiple of TOKENS.
    """
    blocks = tl.cdiv(head_dim, BLOCK)
    head, part, row = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = part.to(tl.int64) * stretch
    u_ptr += row * u_batch + first * u_token + head * head_dim
    at = (row * heads + head) * (tl.cdiv(length, TOKENS) * TOKENS) + first
    sums_ptr += at
    kept_ptr += at
    B_ptr += row * B_batch + first * B_token + head // per_group * B_group
    t = tl.arange(0, TOKENS)
    h = zero_states(BLOCK, PARTS)
    sum_of_all = 0.0
    for _ in range(0, stretch, TOKENS):
        inside = t < TOKENS  # every stretch here is whole
        kept = tl.load(kept_ptr + t)
        total = tl.load(sums_ptr + TOKENS - 1)
        u = tl.load(
            u_ptr + t[:, None] * u_token + p[None, :], mask=inside[:, None] & (p < head_dim)[None, :], other=0.0
        )
        B = load_all_rows(B_ptr, B_token, t, inside, states, PARTS)
        h = advance(h, u, B, kept, total, PARTS, MODE)
        sum_of_all += total
        u_ptr += TOKENS * u_token
        sums_ptr += TOKENS
        kept_ptr += TOKENS
        B_ptr += TOKENS * B_token
    at = (row * tl.num_programs(1) + part) * heads + head
    tl.store(totals_ptr + at, sum_of_all)
    store_states(ends_ptr + at * head_dim * states, p, head_dim, states, h, PARTS)


@triton.jit(do_not_specialize=["length", "stretch", "heads", "per_group"])
def scan_kernel(
    u_ptr,
    u_batch,
    u_token,
    columns_ptr,
    sums_ptr,
    rest_ptr,
    kept_ptr,
    B_ptr,
    B_batch,
    B_token,
    B_group,
    C_ptr,
    C_batch,
    C_token,
    C_group,
    D_ptr,
    state_ptr,
    ends_ptr,
    totals_ptr,
    y_ptr,
    final_ptr,
    length,
    stretch,
    heads,
    per_group,
    head_dim: tl.constexpr,
    states: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    CONTINUES: tl.constexpr,
    MODE: tl.constexpr,
):
    """The output of a stretch of time, and after the last one the final state.

    Grid (H x blocks of P, stretches, sequences). `columns`, `sums`, `rest`, `kept`, `ends`, `totals` as `steps_kernel`
    and `ends_kernel` write them; `y` (B, L, D) and `state`, `final` (B, H, P, N) float32 lie together.
    """
    blocks = tl.cdiv(head_dim, BLOCK)
    head, part, row = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    size = head_dim * states
    if CONTINUES:
        h = load_states(state_ptr + (row * heads + head) * size, p, head_dim, states, PARTS)
    else:
        h = zero_states(BLOCK, PARTS)
    at = row * (tl.num_programs(1) - 1) * heads + head
    h = carry(h, ends_ptr + at * size, totals_ptr + at, part, heads * size, heads, p, head_dim, states, PARTS)
    first = part.to(tl.int64) * stretch
    u_ptr += row * u_batch + first * u_token + head * head_dim
    at = (row * heads + head) * (tl.cdiv(length, TOKENS) * TOKENS) + first
    columns_ptr += at
    sums_ptr += at
    rest_ptr += at
    kept_ptr += at
    B_ptr += row * B_batch + first * B_token + head // per_group * B_group
    C_ptr += row * C_batch + first * C_token + head // per_group * C_group
    y_ptr += (row * length + first) * heads * head_dim + head * head_dim
    skip = tl.load(D_ptr + head).to(tl.float32)
    t = tl.arange(0, TOKENS)
    left = tl.minimum(stretch, length - part * stretch)
    for start in range(0, left, TOKENS):
        inside = t < left - start
        there = inside[:, None] & (p < head_dim)[None, :]
        columns, sums, kept = tl.load(columns_ptr + t), tl.load(sums_ptr + t), tl.load(kept_ptr + t)
        rest = tl.load(rest_ptr + t) if MODE == EXACT else sums  # read by nobody
        total = tl.load(sums_ptr + TOKENS - 1)
        u = tl.load(u_ptr + t[:, None] * u_token + p[None, :], mask=there, other=0.0)
        B = load_all_rows(B_ptr, B_token, t, inside, states, PARTS)
        C = load_all_rows(C_ptr, C_token, t, inside, states, PARTS)
        y = read_state(C, h, PARTS, MODE) * tl.exp2(sums)[:, None]
        weights = weigh(pairs_of(C, B, PARTS, MODE), sums, rest, columns, t, MODE)
        y = added(operand(weights, MODE), operand(u, MODE), y, MODE) + skip * u.to(tl.float32)
        tl.store(y_ptr + t[:, None] * (heads * head_dim) + p[None, :], y.to(y_ptr.dtype.element_ty), mask=there)
        h = advance(h, u, B, kept, total, PARTS, MODE)
        u_ptr += TOKENS * u_token
        columns_ptr += TOKENS
        sums_ptr += TOKENS
        rest_ptr += TOKENS
        kept_ptr += TOKENS
        B_ptr += TOKENS * B_token
        C_ptr += TOKENS * C_token
        y_ptr += TOKENS * heads * head_dim
    if part == tl.num_programs(1) - 1:
        store_states(final_ptr + (row * heads + head) * size, p, head_dim, states, h, PARTS)


@triton.jit(do_not_specialize=["heads", "per_group"])
def token_kernel(
    u_ptr,
    u_batch,
    dt_ptr,
    dt_batch,
    B_ptr,
    B_batch,
    B_group,
    C_ptr,
    C_batch,
    C_group,
    A_ptr,
    bias_ptr,
    D_ptr,
    before_ptr,
    after_ptr,
    y_ptr,
    heads,
    per_group,
    head_dim: tl.constexpr,
    states: tl.constexpr,
    low,
    high,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    LOG_RATES: tl.constexpr,
):
    """One token: h = exp(dt A) h + dt u B', y = h C + D u. Grid (blocks of P, H, sequences); PART holds all of N.

    `before` and `after` (B, H, P, N) float32 lie together and may be the same; `y` (B, D). With LOG_RATES `A` is A_log.
    """
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // per_group
    n = tl.arange(0, PART)
    at = (row * heads + head) * head_dim * states
    h = load_state(before_ptr + at, p, head_dim, 0, states, PART)
    u = tl.load(u_ptr + row * u_batch + head * head_dim + p, mask=p < head_dim, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + row * B_batch + group * B_group + n, mask=n < states, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + row * C_batch + group * C_group + n, mask=n < states, other=0.0).to(tl.float32)
    step = tl.load(dt_ptr + row * dt_batch + head).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step + tl.load(bias_ptr + head).to(tl.float32))
    if LIMITED:
        step = tl.minimum(tl.maximum(step, low), high)
    rate = tl.load(A_ptr + head).to(tl.float32)
    if LOG_RATES:
        rate = -tl.exp(rate)
    h = tl.exp2(step * rate * LOG2_E) * h + (step * u)[:, None] * B[None, :]
    y = tl.sum(h * C[None, :], axis=1) + tl.load(D_ptr + head).to(tl.float32) * u
    store_state(after_ptr + at, p, head_dim, 0, states, h, PART)
    y_at = (row * heads + head) * head_dim + p
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=p < head_dim)


@triton.jit(do_not_specialize=["length"])
def norm_kernel(
    y_ptr,
    y_row,
    z_ptr,
    z_batch,
    z_token,
    weight_ptr,
    out_ptr,
    length,
    width,
    eps,
    BLOCK: tl.constexpr,
    GATE_FIRST: tl.constexpr,
):
    """RMS norm of a group of channels and the gate silu(z), before the norm or behind it.

    Grid (tokens of all sequences, groups). `y` (B L, D) with rows `y_row` apart, `out` (B L, D) lies together.
    """
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    within = tl.arange(0, BLOCK)
    d = group * width + within
    wanted = within < width
    at = row // length * z_batch + row % length * z_token
    y = tl.load(y_ptr + row * y_row + d, mask=wanted, other=0.0).to(tl.float32)
    gate = silu(tl.load(z_ptr + at + d, mask=wanted, other=0.0).to(tl.float32))
    weight = tl.load(weight_ptr + d, mask=wanted, other=0.0)
    if GATE_FIRST:
        y *= gate
    y *= tl.rsqrt(tl.sum(y * y, 0) / width + eps)
    if GATE_FIRST:  # rounded before the weight, as transformers does it
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32) * weight.to(tl.float32)
    else:
        y = y * weight.to(tl.float32) * gate
    tl.store(out_ptr + row * width * tl.num_programs(1) + d, y.to(out_ptr.dtype.element_ty), mask=wanted)
