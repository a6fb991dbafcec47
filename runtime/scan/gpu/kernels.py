"""What the Triton kernels of the selective scan share, and those of one token, of sums over states, of the convolution.

A block of channels lies in the lanes of a warp and every state of it in registers, as tiles of (states, channels). N is
cut into powers of two (12 = 8 + 4), one tile each, because a tile's sides must be powers of two: so 12 states cost
three quarters of 16. B_t and C_t are the same for all lanes and come as one vector load. Everything is computed in
float32, whatever the tensors hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + e^x) to 2e-7 relative: max(x, 0) + log1p(e^-|x|), by a minimax polynomial of log1p(e) / e on [0, 1].

    The logarithm the hardware has is only accurate in absolute terms, and time steps are small.
    """
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    p = 0.005232693627476692 * e - 0.02950523979961872
    p = p * e + 0.07822596281766891
    p = p * e - 0.13663247227668762
    p = p * e + 0.19106008112430573
    p = p * e - 0.2484298199415207
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return tl.where(x > 0, x, 0.0) + p * e


@triton.jit
def silu(x):
    """The gate x / (1 + e^-x)."""
    return x / (1 + tl.exp2(-x * LOG2_E))


@triton.jit
def load_row(ptr, d, channels, WHOLE: tl.constexpr):
    """A block of channels of one token as it is stored; lanes beyond the last channel hold 0."""
    if WHOLE:  # no lane is
        return tl.load(ptr + d)
    return tl.load(ptr + d, mask=d < channels, other=0.0)


@triton.jit
def store_row(ptr, d, channels, value, WHOLE: tl.constexpr):
    """Store a block of channels."""
    if WHOLE:
        tl.store(ptr + d, value)
    else:
        tl.store(ptr + d, value, mask=d < channels)


@triton.jit
def load_tile(ptr, first, d, channels, n_step, d_step, PART: tl.constexpr, WHOLE: tl.constexpr):
    """States first..first+PART-1 of a block of channels, (PART, BLOCK)."""
    at = (first + tl.arange(0, PART))[:, None] * n_step + d[None, :] * d_step
    if WHOLE:
        return tl.load(ptr + at)
    return tl.load(ptr + at, mask=(d < channels)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, first, d, channels, n_step, d_step, value, PART: tl.constexpr, WHOLE: tl.constexpr):
    """Store what `load_tile` loads."""
    at = (first + tl.arange(0, PART))[:, None] * n_step + d[None, :] * d_step
    if WHOLE:
        tl.store(ptr + at, value)
    else:
        tl.store(ptr + at, value, mask=(d < channels)[None, :])


@triton.jit
def load_tiles(ptr, d, channels, n_step, d_step, PARTS: tl.constexpr, WHOLE: tl.constexpr):
    """All states of a block of channels, a tuple of tiles (PARTS[i], BLOCK)."""
    tiles = ()
    first = 0
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (load_tile(ptr, first, d, channels, n_step, d_step, PARTS[i], WHOLE),)
        first += PARTS[i]
    return tiles


@triton.jit
def store_tiles(ptr, d, channels, n_step, d_step, tiles, PARTS: tl.constexpr, WHOLE: tl.constexpr):
    """Store what `load_tiles` loads."""
    first = 0
    for i in tl.static_range(len(PARTS)):
        store_tile(ptr, first, d, channels, n_step, d_step, tiles[i], PARTS[i], WHOLE)
        first += PARTS[i]


@triton.jit
def zero_tile(PART: tl.constexpr, BLOCK: tl.constexpr):
    """(PART, BLOCK) zeros."""
    return tl.zeros((PART, BLOCK), tl.float32)


@triton.jit
def zero_tiles(PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """A tuple of zero tiles (PARTS[i], BLOCK)."""
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (zero_tile(PARTS[i], BLOCK),)
    return tiles


@triton.jit
def load_vector(ptr, first, PART: tl.constexpr):
    """Numbers first..first+PART-1 of a row of B or C, as they are stored."""
    return tl.load(ptr + first + tl.arange(0, PART))


@triton.jit
def load_vectors(ptr, PARTS: tl.constexpr):
    """A row of B or C as a tuple of vectors (PARTS[i],)."""
    vectors = ()
    first = 0
    for i in tl.static_range(len(PARTS)):
        vectors = vectors + (load_vector(ptr, first, PARTS[i]),)
        first += PARTS[i]
    return vectors


@triton.jit
def time_step(raw, bias, SOFTPLUS: tl.constexpr):
    """dt of a block of channels in float32, from what is stored."""
    if SOFTPLUS:
        return softplus(raw.to(tl.float32) + bias.to(tl.float32))
    return raw.to(tl.float32)


@triton.jit
def rates_of(logs, PARTS: tl.constexpr):
    """A = -e^A_log of a tuple of tiles."""
    rates = ()
    for i in tl.static_range(len(PARTS)):
        rates = rates + (-tl.exp(logs[i].to(tl.float32)),)
    return rates


@triton.jit
def advance(h, rates, step, drive, B, PARTS: tl.constexpr):
    """The states one token later: h_t = 2^(dt rate) h_{t-1} + dt u B_t, with rate = A log2(e)."""
    after = ()
    for i in tl.static_range(len(PARTS)):
        decay = tl.exp2(step[None, :] * rates[i])
        after = after + (decay * h[i] + drive[None, :] * B[i].to(tl.float32)[:, None],)
    return after


@triton.jit
def read_out(h, C, PARTS: tl.constexpr):
    """sum_n C_t[n] h_t[n], (BLOCK,)."""
    y = tl.sum(h[0] * C[0].to(tl.float32)[:, None], axis=0)
    for i in tl.static_range(1, len(PARTS)):
        y += tl.sum(h[i] * C[i].to(tl.float32)[:, None], axis=0)
    return y


@triton.jit
def token_kernel(
    u_ptr,
    u_batch,
    dt_ptr,
    dt_batch,
    z_ptr,
    z_batch,
    B_ptr,
    B_batch,
    C_ptr,
    C_batch,
    A_ptr,
    bias_ptr,
    skip_ptr,
    before_ptr,
    after_ptr,
    y_ptr,
    channels,
    STATES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
    LOG_RATES: tl.constexpr,
):
    """One token: `after` (B, D, N) from `before`, which may be the same memory, and the output `y` (B, D).

    Grid (blocks of channels, sequences). The states of a channel lie together, so lanes run over both: moving the state
    is all the time this takes, and no lane moves padding. With LOG_RATES `A` is A_log.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    u = load_row(u_ptr + row * u_batch, d, channels, WHOLE).to(tl.float32)
    bias = load_row(bias_ptr, d, channels, WHOLE) if SOFTPLUS else 0.0
    step = time_step(load_row(dt_ptr + row * dt_batch, d, channels, WHOLE), bias, SOFTPLUS)
    B, C = load_vectors(B_ptr + row * B_batch, PARTS), load_vectors(C_ptr + row * C_batch, PARTS)
    rates = load_tiles(A_ptr, d, channels, 1, STATES, PARTS, WHOLE)
    if LOG_RATES:
        rates = rates_of(rates, PARTS)
    h = load_tiles(before_ptr + row * channels * STATES, d, channels, 1, STATES, PARTS, WHOLE)
    h = advance(h, rates, step * LOG2_E, step * u, B, PARTS)
    store_tiles(after_ptr + row * channels * STATES, d, channels, 1, STATES, h, PARTS, WHOLE)
    y = read_out(h, C, PARTS) + load_row(skip_ptr, d, channels, WHOLE).to(tl.float32) * u
    if GATED:
        y = y * silu(load_row(z_ptr + row * z_batch, d, channels, WHOLE).to(tl.float32))
    store_row(y_ptr + row * channels, d, channels, y.to(y_ptr.dtype.element_ty), WHOLE)


@triton.jit
def load_padded(ptr, d, channels, n_step, d_step, states, PART: tl.constexpr):
    """States of a block of channels, (PART, BLOCK); 0 in rows past the last state and lanes past the last channel."""
    n = tl.arange(0, PART)
    inside = (n < states)[:, None] & (d < channels)[None, :]
    return tl.load(ptr + n[:, None] * n_step + d[None, :] * d_step, mask=inside, other=0.0)


@triton.jit
def store_padded(ptr, d, channels, n_step, d_step, states, value, PART: tl.constexpr):
    """Store what `load_padded` loads."""
    n = tl.arange(0, PART)
    inside = (n < states)[:, None] & (d < channels)[None, :]
    tl.store(ptr + n[:, None] * n_step + d[None, :] * d_step, value, mask=inside)


@triton.jit(do_not_specialize=["length", "chunk"])
def moments_kernel(
    u_ptr,
    u_batch,
    u_token,
    dt_ptr,
    dt_batch,
    dt_token,
    z_ptr,
    z_batch,
    z_token,
    B_ptr,
    B_batch,
    B_token,
    C_ptr,
    C_batch,
    C_token,
    A_ptr,
    bias_ptr,
    starts_ptr,
    before_ptr,
    after_ptr,
    readouts_ptr,
    grams_ptr,
    final_ptr,
    length,
    chunk,
    channels,
    states,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Sums over the states of one chunk, which never leave the registers.

    Grid (blocks of channels, chunks, sequences). Over time: `before`, `after` and `readouts` (B, chunks, N, D), the
    sums of h_{t-1}^2, h_t^2 and (C_t h_t)^2. Over the block's channels: `grams` (blocks, B, L, N, N), the sums of
    g_t^2 h_t h_t', g = silu(z). Nothing is added up across programs: that would make the order of the sums chance.
    `starts` (B, chunks, N, D), the state each chunk starts from, is read if STARTED.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, PART)
    part, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    size = channels * states
    rates = load_padded(A_ptr, d, channels, 1, states, states, PART) * LOG2_E
    bias = load_row(bias_ptr, d, channels, False) if SOFTPLUS else 0.0
    if STARTED:
        at = (row * tl.num_programs(1) + part) * size
        h = load_padded(starts_ptr + at, d, channels, channels, 1, states, PART)
    else:
        h = tl.zeros((PART, BLOCK), tl.float32)

    first = part.to(tl.int64) * chunk
    u_ptr += row * u_batch + first * u_token
    dt_ptr += row * dt_batch + first * dt_token
    z_ptr += row * z_batch + first * z_token
    B_ptr += row * B_batch + first * B_token
    C_ptr += row * C_batch + first * C_token
    block = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + row
    grams_ptr += (block * length + first) * states * states
    pairs = n[:, None] * states + n[None, :]
    paired = (n < states)[:, None] & (n < states)[None, :]
    before, after, readouts = tl.zeros_like(h), tl.zeros_like(h), tl.zeros_like(h)
    for _ in range(0, tl.minimum(length - part * chunk, chunk)):
        before += h * h
        step = time_step(load_row(dt_ptr, d, channels, False), bias, SOFTPLUS)
        if SOFTPLUS:
            step = tl.where(d < channels, step, 0.0)
        drive = step * load_row(u_ptr, d, channels, False).to(tl.float32)
        B = tl.load(B_ptr + n, mask=n < states, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + n, mask=n < states, other=0.0).to(tl.float32)
        h = tl.exp2(step[None, :] * rates) * h + drive[None, :] * B[:, None]
        after += h * h
        read = h * C[:, None]
        readouts += read * read
        gated = h
        if GATED:
            gated = h * silu(load_row(z_ptr, d, channels, False).to(tl.float32))[None, :]
        gram = tl.dot(gated, tl.trans(gated), input_precision="ieee")
        tl.store(grams_ptr + pairs, gram, mask=paired)
        u_ptr += u_token
        dt_ptr += dt_token
        z_ptr += z_token
        B_ptr += B_token
        C_ptr += C_token
        grams_ptr += states * states
    at = (row * tl.num_programs(1) + part) * size
    store_padded(before_ptr + at, d, channels, channels, 1, states, before, PART)
    store_padded(after_ptr + at, d, channels, channels, 1, states, after, PART)
    store_padded(readouts_ptr + at, d, channels, channels, 1, states, readouts, PART)
    if part == tl.num_programs(1) - 1:
        store_padded(final_ptr + row * size, d, channels, 1, states, states, h, PART)


@triton.jit(do_not_specialize=["length"])
def conv_kernel(
    x_ptr,
    x_batch,
    x_token,
    history_ptr,
    history_batch,
    history_token,
    history_channel,
    weight_ptr,
    bias_ptr,
    u_ptr,
    length,
    channels,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    CONTINUES: tl.constexpr,
):
    """u_t = silu(bias + sum_k w_k x_{t-WIDTH+1+k}) for a block of tokens and channels; inputs before x in `history`.

    Grid (blocks of channels, blocks of tokens, sequences). `weight` (D, WIDTH) contiguous; `u` (B, L, D) contiguous.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(2).to(tl.int64)
    x_ptr += row * x_batch
    history_ptr += row * history_batch
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    if BIASED:
        total += tl.load(bias_ptr + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + d * WIDTH + k, mask=d < channels, other=0.0).to(tl.float32)
        at = t - (WIDTH - 1) + k
        wanted = ((at >= 0) & (at < length))[:, None] & (d < channels)[None, :]
        x = tl.load(x_ptr + at.to(tl.int64)[:, None] * x_token + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        if CONTINUES and k < WIDTH - 1:
            before = (at < 0)[:, None] & (d < channels)[None, :]
            where = (at + WIDTH - 1)[:, None] * history_token + d[None, :] * history_channel
            x += tl.load(history_ptr + where, mask=before, other=0.0).to(tl.float32)
        total += tap[None, :] * x
    at = (row * length + t)[:, None] * channels + d[None, :]
    value = silu(total).to(u_ptr.dtype.element_ty)
    tl.store(u_ptr + at, value, mask=(t < length)[:, None] & (d < channels)[None, :])
