"""The Triton kernels of the gradients of Mamba-2's scan; `backward` launches them.

With L[t, s] = exp(sum of dt A from s + 1 to t) within a chunk, G = C B', W[t, s] = G[t, s] L[t, s] dt_s, h the state
before the chunk, g the gradient of the state after it, S_t the sum up to t and w_s = exp(S_T - S_s) dt_s:

    du = W' dy + D dy + w (B g')              dC = (dW L dt) B + exp(S) (dy h)        with dW = dy u'
    dh = exp(S_T) g + (dy exp(S))' C          dB = (dW L dt)' C + w (u g)

and dt and A get theirs through the sums S: each exp(S_t) and exp(-S_s) hands what it multiplies to S_t and S_s, and a
token's dt A is in all sums from its own on. Everything of a head is linear in its channels, so blocks of them add up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmc.runtime.scan.gpu.ssd.kernels import (
    EXACT,
    added,
    advance,
    decay_between,
    load_all_rows,
    load_states,
    operand,
    pairs_of,
    product,
    rate_of,
    running_sums,
    store_states,
    zero_states,
)


@triton.jit
def load_tokens(ptr, token, t, inside, p, head_dim: tl.constexpr):
    """Channels of a head at the tokens of a chunk, (TOKENS, BLOCK)."""
    return tl.load(ptr + t[:, None] * token + p[None, :], mask=inside[:, None] & (p < head_dim)[None, :], other=0.0)


@triton.jit(do_not_specialize=["length", "heads", "per_group"])
def states_kernel(
    u_ptr,
    u_batch,
    u_token,
    dt_ptr,
    dt_batch,
    dt_token,
    B_ptr,
    B_batch,
    B_token,
    B_group,
    A_ptr,
    first_ptr,
    first_batch,
    before_ptr,
    length,
    heads,
    per_group,
    head_dim: tl.constexpr,
    states: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    MODE: tl.constexpr,
):
    """The state before every chunk. Grid (H x blocks of P, sequences); `before` (B, chunks, H, P, N)."""
    blocks = tl.cdiv(head_dim, BLOCK)
    head, row = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    size = head_dim * states
    h = load_states(first_ptr + row * first_batch + head * size, p, head_dim, states, PARTS)
    u_ptr += row * u_batch + head * head_dim
    dt_ptr += row * dt_batch + head
    B_ptr += row * B_batch + head // per_group * B_group
    before_ptr += (row * tl.cdiv(length, TOKENS) * heads + head) * size
    rate = rate_of(tl.load(A_ptr + head))
    t = tl.arange(0, TOKENS)
    for start in range(0, length, TOKENS):
        inside = t < length - start
        store_states(before_ptr, p, head_dim, states, h, PARTS)
        steps = tl.load(dt_ptr + t * dt_token, mask=inside, other=0.0)
        u = load_tokens(u_ptr, u_token, t, inside, p, head_dim)
        B = load_all_rows(B_ptr, B_token, t, inside, states, PARTS)
        _sums, _rest, total, to_end = running_sums(steps * rate, MODE)
        h = advance(h, u, B, steps * tl.exp2(to_end), total, PARTS, MODE)
        u_ptr += TOKENS * u_token
        dt_ptr += TOKENS * dt_token
        B_ptr += TOKENS * B_token
        before_ptr += heads * size


@triton.jit(do_not_specialize=["length", "heads", "per_group"])
def state_gradients_kernel(
    dy_ptr,
    dy_batch,
    dy_token,
    dt_ptr,
    dt_batch,
    dt_token,
    C_ptr,
    C_batch,
    C_token,
    C_group,
    A_ptr,
    last_ptr,
    after_ptr,
    length,
    heads,
    per_group,
    head_dim: tl.constexpr,
    states: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    MODE: tl.constexpr,
):
    """The gradient of the state after every chunk, last first. Grid and `after` as for `states_kernel`.

    `last` (B, H, P, N) float32 is the gradient of the state behind all of them, and becomes that of the one before.
    """
    blocks = tl.cdiv(head_dim, BLOCK)
    head, row = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    size = head_dim * states
    chunks = tl.cdiv(length, TOKENS)
    last_ptr += (row * heads + head) * size
    g = load_states(last_ptr, p, head_dim, states, PARTS)
    final = (chunks - 1).to(tl.int64)
    dy_ptr += row * dy_batch + head * head_dim + final * TOKENS * dy_token
    dt_ptr += row * dt_batch + head + final * TOKENS * dt_token
    C_ptr += row * C_batch + head // per_group * C_group + final * TOKENS * C_token
    after_ptr += ((row * chunks + final) * heads + head) * size
    rate = rate_of(tl.load(A_ptr + head))
    t = tl.arange(0, TOKENS)
    for done in range(0, chunks):
        inside = t < length - (chunks - 1 - done) * TOKENS
        store_states(after_ptr, p, head_dim, states, g, PARTS)
        steps = tl.load(dt_ptr + t * dt_token, mask=inside, other=0.0)
        dy = load_tokens(dy_ptr, dy_token, t, inside, p, head_dim)
        C = load_all_rows(C_ptr, C_token, t, inside, states, PARTS)
        sums, _rest, total, _to_end = running_sums(steps * rate, MODE)
        g = advance(g, dy, C, tl.exp2(sums), total, PARTS, MODE)
        dy_ptr -= TOKENS * dy_token
        dt_ptr -= TOKENS * dt_token
        C_ptr -= TOKENS * C_token
        after_ptr -= heads * size
    store_states(last_ptr, p, head_dim, states, g, PARTS)


@triton.jit
def back_through_state(tokens, h, PARTS: tl.constexpr, MODE: tl.constexpr):
    """(TOKENS, N) @ (P, N)', (TOKENS, BLOCK)."""
    out = product(operand(tokens[0], MODE), tl.trans(operand(h[0], MODE)), MODE)
    for i in tl.static_range(1, len(PARTS)):
        out = added(operand(tokens[i], MODE), tl.trans(operand(h[i], MODE)), out, MODE)
    return out


@triton.jit
def gather(sums, tokens, h, PARTS: tl.constexpr, MODE: tl.constexpr):
    """sums + (TOKENS, BLOCK) @ (P, N), a tuple of tiles (TOKENS, PARTS[i])."""
    tokens = operand(tokens, MODE)
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (added(tokens, operand(h[i], MODE), sums[i], MODE),)
    return out


@triton.jit
def inner(g, h, PARTS: tl.constexpr):
    """The sum of all products of two states."""
    total = tl.sum(g[0] * h[0])
    for i in tl.static_range(1, len(PARTS)):
        total += tl.sum(g[i] * h[i])
    return total


@triton.jit
def store_rows(ptr, t, inside, states: tl.constexpr, tiles, PARTS: tl.constexpr):
    """Store a tuple of tiles (TOKENS, PARTS[i]) to rows of N numbers that lie together."""
    first = 0
    for i in tl.static_range(len(PARTS)):
        n = first + tl.arange(0, PARTS[i])
        tl.store(ptr + t[:, None] * states + n[None, :], tiles[i], mask=inside[:, None] & (n < states)[None, :])
        first += PARTS[i]


@triton.jit(do_not_specialize=["length", "heads", "per_group", "per_slice", "slices"])
def gradients_kernel(
    u_ptr,
    u_batch,
    u_token,
    dy_ptr,
    dy_batch,
    dy_token,
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
    D_ptr,
    before_ptr,
    after_ptr,
    du_ptr,
    du_batch,
    du_token,
    ddt_ptr,
    ddt_batch,
    ddt_token,
    dB_ptr,
    dC_ptr,
    dA_ptr,
    dD_ptr,
    length,
    heads,
    per_group,
    per_slice,
    slices,
    head_dim: tl.constexpr,
    states: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    MODE: tl.constexpr,
    OF_HEADS: tl.constexpr,
    OF_GROUPS: tl.constexpr,
):
    """All gradients of one chunk, of some heads of a group; the sums for B and C stay in registers from head to head.

    Grid (chunks, G x slices of its heads, sequences). `dB`, `dC` (slices, B, L, G, N), `dA`, `dD` (B, chunks, H). Where
    registers do not hold all, what heads have of their own and what their group shares is computed by two launches.
    """
    chunk, row = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    group, part = tl.program_id(1) // slices, tl.program_id(1) % slices
    groups = tl.num_programs(1) // slices
    first = group * per_group + part * per_slice
    last = tl.minimum(first + per_slice, (group + 1) * per_group)
    t = tl.arange(0, TOKENS)
    inside = t < length - chunk * TOKENS
    B_ptr += row * B_batch + chunk * TOKENS * B_token + group * B_group
    C_ptr += row * C_batch + chunk * TOKENS * C_token + group * C_group
    B = load_all_rows(B_ptr, B_token, t, inside, states, PARTS)
    C = load_all_rows(C_ptr, C_token, t, inside, states, PARTS)
    pairs = pairs_of(C, B, PARTS, MODE)
    d_pairs = tl.zeros((TOKENS, TOKENS), tl.float32)
    dB, dC = zero_states(TOKENS, PARTS), zero_states(TOKENS, PARTS)
    u_ptr += row * u_batch + chunk * TOKENS * u_token
    dy_ptr += row * dy_batch + chunk * TOKENS * dy_token
    du_ptr += row * du_batch + chunk * TOKENS * du_token
    dt_ptr += row * dt_batch + chunk * TOKENS * dt_token
    ddt_ptr += row * ddt_batch + chunk * TOKENS * ddt_token
    at = (row * tl.num_programs(0) + chunk) * heads
    for head in range(first, last):
        A = tl.load(A_ptr + head)
        skip = tl.load(D_ptr + head).to(tl.float32)
        steps = tl.load(dt_ptr + t * dt_token + head, mask=inside, other=0.0)
        sums, rest, total, to_end = running_sums(steps * rate_of(A), MODE)
        decay = decay_between(sums, rest, t, MODE)
        since, until = tl.exp2(sums), tl.exp2(to_end)
        by_step = tl.zeros((TOKENS,), tl.float32)  # what multiplies dt, but for its decay
        by_sum = tl.zeros((TOKENS,), tl.float32)  # gradients of the sums S
        by_end = tl.zeros((TOKENS,), tl.float32)  # gradients of what is left at the end of the chunk
        by_pairs = tl.zeros((TOKENS,), tl.float32)  # gradients of dt A, from pairs of tokens around it
        by_total, by_skip = 0.0, 0.0
        for start in range(0, head_dim, BLOCK):
            p = start + tl.arange(0, BLOCK)
            u = load_tokens(u_ptr + head * head_dim, u_token, t, inside, p, head_dim)
            dy = load_tokens(dy_ptr + head * head_dim, dy_token, t, inside, p, head_dim)
            h = load_states(before_ptr + (at + head) * head_dim * states, p, head_dim, states, PARTS)
            g = load_states(after_ptr + (at + head) * head_dim * states, p, head_dim, states, PARTS)
            d_weights = product(operand(dy, MODE), tl.trans(operand(u, MODE)), MODE) * decay
            wide_u, wide_dy = u.to(tl.float32), dy.to(tl.float32)
            if OF_GROUPS:
                d_pairs += d_weights * steps[None, :]
                dB = gather(dB, wide_u * (until * steps)[:, None], g, PARTS, MODE)
                dC = gather(dC, wide_dy * since[:, None], h, PARTS, MODE)
            if OF_HEADS:
                from_after = back_through_state(B, g, PARTS, MODE) * until[:, None]
                weights = operand(tl.trans(pairs * decay * steps[None, :]), MODE)
                du = added(weights, operand(dy, MODE), skip * wide_dy + from_after * steps[:, None], MODE)
                there = inside[:, None] & (p < head_dim)[None, :]
                du_at = du_ptr + head * head_dim + t[:, None] * du_token + p[None, :]
                tl.store(du_at, du.to(du_ptr.dtype.element_ty), mask=there)
                to_after = tl.sum(wide_u * from_after, 1)
                d_weights *= pairs
                by_step += tl.sum(d_weights, 0) + to_after
                # a token's own pair depends on no decay; left in, it would drown the others before it cancels
                d_weights = tl.where(t[:, None] > t[None, :], d_weights, 0.0)
                if MODE == EXACT:
                    spans = tl.cumsum(d_weights * steps[None, :], 1) - d_weights * steps[None, :]
                    by_pairs += tl.sum(tl.where(t[:, None] >= t[None, :], spans, 0.0), 0)
                else:  # the same sums as differences, which half precision does not feel
                    by_sum += tl.sum(d_weights * steps[None, :], 1) - tl.sum(d_weights, 0) * steps
                by_sum += tl.sum(wide_dy * back_through_state(C, h, PARTS, MODE) * since[:, None], 1)
                by_end += to_after * steps
                by_total += tl.exp2(total) * inner(g, h, PARTS)
                by_skip += tl.sum(wide_dy * wide_u)
        if OF_HEADS:
            # token t's dt A is in the sums of t and later ones, and in what is left at the end of what came before t
            by_exponent = by_total + by_pairs + tl.cumsum(by_end, 0) - by_end + tl.cumsum(by_sum, 0, reverse=True)
            tl.store(ddt_ptr + t * ddt_token + head, by_step + A * by_exponent, mask=inside)
            tl.store(dA_ptr + at + head, tl.sum(by_exponent * steps))
            tl.store(dD_ptr + at + head, by_skip)
    if OF_GROUPS:
        dC = gather(dC, d_pairs, B, PARTS, MODE)
        dB = gather(dB, tl.trans(d_pairs), C, PARTS, MODE)
        t_at = ((part * tl.num_programs(2) + row) * length + chunk * TOKENS) * groups * states + group * states
        store_rows(dB_ptr + t_at, t * groups, inside, states, dB, PARTS)
        store_rows(dC_ptr + t_at, t * groups, inside, states, dC, PARTS)
