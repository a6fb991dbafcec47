"""The Triton kernel of sums over the states of a Mamba-2, which never reach memory; `moments` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from ssmc.runtime.scan.gpu.ssd.kernels import added, load_state, rate_of, store_state


@triton.jit
def carried(ends_ptr, totals_ptr, h, count, step, total_step, p, head_dim: tl.constexpr, first, states: tl.constexpr):
    """A tile of the state after `count` stretches, as `kernels.carry`."""
    for _ in range(count):
        h = tl.exp2(tl.load(totals_ptr)) * h + load_state(ends_ptr, p, head_dim, first, states, h.shape[1])
        ends_ptr += step
        totals_ptr += total_step
    return h


@triton.jit(do_not_specialize=["length", "stretch", "heads", "per_group"])
def moments_kernel(
    u_ptr,
    u_batch,
    u_token,
    gain_ptr,
    dt_ptr,
    dt_batch,
    dt_token,
    B_ptr,
    B_batch,
    B_token,
    B_group,
    C_ptr,
    C_batch,
    C_token,
    C_group,
    A_ptr,
    state_ptr,
    ends_ptr,
    totals_ptr,
    after_ptr,
    readouts_ptr,
    cross_ptr,
    gram_ptr,
    final_ptr,
    length,
    stretch,
    heads,
    per_group,
    head_dim: tl.constexpr,
    states: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CONTINUES: tl.constexpr,
    MODE: tl.constexpr,
):
    """Sums over a stretch of time for two tiles of a head's states, with x_t[p, n] = gain_t[p] C_t[n] h_t[p, n].

    Grid (H x blocks of P x pairs of tiles, stretches, sequences). `after` (sum of h^2) and `readouts` (of (C h)^2)
    (B, stretches, H, P, N) and `cross` (of x gain u) alike are those of the first tile and stored where both are the
    same; `gram` (B, stretches, H x blocks, pairs, TILE, TILE) is the sum of x_t' x_t. `gain` (B, L, D) float32 and the
    states lie together; dt is float32 after softplus.
    """
    blocks: tl.constexpr = (head_dim + BLOCK - 1) // BLOCK
    tiles: tl.constexpr = (states + TILE - 1) // TILE
    pairs: tl.constexpr = tiles * (tiles + 1) // 2
    item, part, row = tl.program_id(0) // pairs, tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = tl.program_id(0) % pairs
    left, right = 0, 0
    before = 0
    for i in tl.static_range(tiles):  # pair number -> two tiles, the first not behind the second
        inside = (pair >= before) & (pair < before + tiles - i)
        left = tl.where(inside, i, left)
        right = tl.where(inside, i + pair - before, right)
        before += tiles - i
    head = item // blocks
    p = item % blocks * BLOCK + tl.arange(0, BLOCK)
    n, m = left * TILE + tl.arange(0, TILE), right * TILE + tl.arange(0, TILE)
    size = head_dim * states
    h, g = tl.zeros((BLOCK, TILE), tl.float32), tl.zeros((BLOCK, TILE), tl.float32)
    if CONTINUES:
        h = load_state(state_ptr + (row * heads + head) * size, p, head_dim, left * TILE, states, TILE)
        g = load_state(state_ptr + (row * heads + head) * size, p, head_dim, right * TILE, states, TILE)
    at = row * (tl.num_programs(1) - 1) * heads + head
    ends_ptr += at * size
    h = carried(ends_ptr, totals_ptr + at, h, part, heads * size, heads, p, head_dim, left * TILE, states)
    g = carried(ends_ptr, totals_ptr + at, g, part, heads * size, heads, p, head_dim, right * TILE, states)
    first = part.to(tl.int64) * stretch
    u_ptr += row * u_batch + first * u_token + head * head_dim
    gain_ptr += (row * length + first) * heads * head_dim + head * head_dim
    dt_ptr += row * dt_batch + first * dt_token + head
    B_ptr += row * B_batch + first * B_token + head // per_group * B_group
    C_ptr += row * C_batch + first * C_token + head // per_group * C_group
    rate = rate_of(tl.load(A_ptr + head))
    after, readouts = tl.zeros((BLOCK, TILE), tl.float32), tl.zeros((BLOCK, TILE), tl.float32)
    cross, gram = tl.zeros((BLOCK, TILE), tl.float32), tl.zeros((TILE, TILE), tl.float32)
    for _ in range(0, tl.minimum(stretch, length - part * stretch)):
        step = tl.load(dt_ptr)
        u = tl.load(u_ptr + p, mask=p < head_dim, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + p, mask=p < head_dim, other=0.0)
        decay, drive = tl.exp2(step * rate), step * u
        h = decay * h + drive[:, None] * tl.load(B_ptr + n, mask=n < states, other=0.0).to(tl.float32)[None, :]
        g = decay * g + drive[:, None] * tl.load(B_ptr + m, mask=m < states, other=0.0).to(tl.float32)[None, :]
        x = h * tl.load(C_ptr + n, mask=n < states, other=0.0).to(tl.float32)[None, :]
        y = g * (tl.load(C_ptr + m, mask=m < states, other=0.0).to(tl.float32)[None, :] * gain[:, None])
        after += h * h
        readouts += x * x
        x *= gain[:, None]
        cross += x * (gain * u)[:, None]
        gram = added(tl.trans(x), y, gram, MODE)
        u_ptr += u_token
        gain_ptr += heads * head_dim
        dt_ptr += dt_token
        B_ptr += B_token
        C_ptr += C_token
    at = ((row * tl.num_programs(1) + part) * heads + head) * size
    if left == right:
        store_state(after_ptr + at, p, head_dim, left * TILE, states, after, TILE)
        store_state(readouts_ptr + at, p, head_dim, left * TILE, states, readouts, TILE)
        store_state(cross_ptr + at, p, head_dim, left * TILE, states, cross, TILE)
        if part == tl.num_programs(1) - 1:
            store_state(final_ptr + (row * heads + head) * size, p, head_dim, left * TILE, states, h, TILE)
    at = ((row * tl.num_programs(1) + part) * tl.num_programs(0) + tl.program_id(0)) * TILE * TILE
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    tl.store(gram_ptr + at + rows * TILE + columns, gram)
