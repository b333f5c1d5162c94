"""Prompt tokens read image cells: split over the cells, then one stable merge of the splits.

Few queries cannot fill a GPU, so each program takes a chunk of the image (split-K). A chunk leaves its own
normalised answer and the log2 of its sum of exponentials; the merge weighs the answers by those and closes
with the output projection, the residual and the LayerNorm. Partial answers are f32[E, splits, N, H*D] and
their logarithms f32[E, splits, N, H], for E expressions of all images together.

Bounds of loops are constants: Triton's interpreter takes no others, and a model has few different sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.tiles import add, dot, dot_add, norm, online


@triton.jit
def read_folded(
    p_q, p_x, p_position, p_wv, rows, N, M, splits, group, position_stride, p_part, p_lse,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BR: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Folded queries over the image as it lies in memory; grid (row blocks, splits, images).

    q f[images, rows, C], the rows of an image being (expression of its group, head, token); image x f[images,
    M, C], position f[images or 1, M, C]. The image is both key and value: it is read once for all heads and
    all expressions. The value projection wv f[H*D, C] follows per chunk, so that partial answers are narrow.
    Products over the C columns take BK at a time: of wide fp32 rows no more fit the registers.
    """
    i_s, i_g = tl.program_id(1), tl.program_id(2).to(tl.int64)
    r, c = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, C)
    inside = r < rows
    q_at, keep = p_q + (i_g * rows + r)[:, None] * C, inside[:, None]
    if BK == C:
        q = tl.load(q_at + c[None, :], mask=keep, other=0.0)
    m_i = tl.full([BR], float("-inf"), tl.float32)
    l_i = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, C], tl.float32)
    for start in range(0, CHUNK, BM):
        m = i_s * CHUNK + start + tl.arange(0, BM)
        cell = (m < M)[:, None]
        x_at = p_x + (i_g * M + m)[:, None] * C
        place_at = p_position + i_g * position_stride + m[:, None] * C
        x = tl.load(x_at + c[None, :], mask=cell, other=0.0)  # [BM, C]
        if BK == C:
            place = tl.load(place_at + c[None, :], mask=cell, other=0.0)
            scores = dot(q, tl.trans(add(x, place)))  # [BR, BM]
        else:
            scores = tl.zeros([BR, BM], tl.float32)
            for first in range(0, C, BK):
                k = first + tl.arange(0, BK)
                part_q = tl.load(q_at + k[None, :], mask=keep, other=0.0)
                part_x = tl.load(x_at + k[None, :], mask=cell, other=0.0)
                place = tl.load(place_at + k[None, :], mask=cell, other=0.0)
                scores = dot_add(part_q, tl.trans(add(part_x, place)), scores)
        scores = tl.where((m < M)[None, :], scores, float("-inf"))
        p, before, m_i, l_i = online(scores, m_i, l_i)
        acc = dot_add(p.to(x.dtype), x, acc * before[:, None])
    read = (acc / l_i[:, None]).to(p_q.dtype.element_ty)
    if BK != C:
        read = tl.permute(tl.reshape(read, [BR, C // BK, BK]), [1, 0, 2])
    i_n, i_h = r % N, (r // N) % H
    part = ((i_g * group + r // (N * H)) * splits + i_s) * N + i_n  # row of partial answers
    tl.store(p_lse + part * H + i_h, m_i + tl.log2(l_i), mask=inside)
    # A row belongs to one head: the others' columns of the product are not stored.
    for j in range(0, H * D, BV):
        o = j + tl.arange(0, BV)
        if BK == C:
            value = dot(read, tl.load(p_wv + o[None, :] * C + c[:, None]))  # [BR, BV]
        else:
            k = tl.arange(0, C // BK)[:, None, None] * BK + tl.arange(0, BK)[None, :, None]
            value = tl.sum(dot(read, tl.load(p_wv + o[None, None, :] * C + k)), 0)
        own = keep & (o[None, :] // D == i_h[:, None])
        tl.store(p_part + part[:, None] * (H * D) + o[None, :], value, mask=own)


@triton.jit
def read_heads(
    p_q, p_k, p_v, rows, N, M, scale, splits, group, p_part, p_lse,
    H: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Projected queries over projected keys and values; grid (row blocks, splits, images * heads).

    q f[images, rows, H*D], the rows of an image being (expression of its group, token); k, v f[images, M,
    H*D], without the value's bias, which the merge adds.
    """
    i_s, i_h = tl.program_id(1), tl.program_id(2) % H
    i_g = (tl.program_id(2) // H).to(tl.int64)
    r, d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, D)
    inside = r < rows
    column = i_h * D + d
    q = tl.load(p_q + (i_g * rows + r)[:, None] * (H * D) + column[None, :], mask=inside[:, None], other=0.0)
    m_i = tl.full([BR], float("-inf"), tl.float32)
    l_i = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, D], tl.float32)
    for start in range(0, CHUNK, BM):
        m = i_s * CHUNK + start + tl.arange(0, BM)
        key = (i_g * M + m) * (H * D)
        k = tl.load(p_k + key[None, :] + column[:, None], mask=(m < M)[None, :], other=0.0)  # [D, BM]
        v = tl.load(p_v + key[:, None] + column[None, :], mask=(m < M)[:, None], other=0.0)  # [BM, D]
        scores = tl.where((m < M)[None, :], dot(q, k) * scale, float("-inf"))
        p, before, m_i, l_i = online(scores, m_i, l_i)
        acc = dot_add(p.to(v.dtype), v, acc * before[:, None])
    part = ((i_g * group + r // N) * splits + i_s) * N + r % N
    tl.store(p_lse + part * H + i_h, m_i + tl.log2(l_i), mask=inside)
    at = p_part + part[:, None] * (H * D) + column[None, :]
    tl.store(at, acc / l_i[:, None], mask=inside[:, None])


@triton.jit
def merge(
    p_part, p_lse, p_bv, p_wo, p_bo, p_x, p_gamma, p_beta, p_mask, p_after, N, eps, p_out,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
    SPLITS: tl.constexpr, BS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_AFTER: tl.constexpr,
):  # fmt: skip
    """Splits to LayerNorm(x + out(attention)); grid (token blocks, expressions).

    The logarithms are spread over the columns of their head, so that weighing is elementwise and BS splits
    are taken at once: a chain of a few loads, not one for each split and head. BJ columns are merged at a
    time and go into the output projection at once.
    """
    i_e = tl.program_id(1).to(tl.int64)
    n, c = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, C)
    inside = n < N
    safe = tl.minimum(n, N - 1)  # rows past the end repeat the last one and are not stored
    # Narrow offsets from a wide base: pointers of 64 bits for every element would spill.
    p_part_e = p_part + i_e * SPLITS * N * (H * D)
    p_lse_e = p_lse + i_e * SPLITS * N * H
    y = tl.zeros([BT, C], tl.float32)
    for first in range(0, H * D, BJ):
        j = first + tl.arange(0, BJ)
        m_i = tl.full([BT, BJ], float("-inf"), tl.float32)
        l_i = tl.zeros([BT, BJ], tl.float32)
        acc = tl.zeros([BT, BJ], tl.float32)
        for start in range(0, SPLITS, BS):
            s = start + tl.arange(0, BS)
            row = (s[:, None] * N + safe[None, :])[:, :, None]  # [BS, BT, 1]
            there = (s < SPLITS)[:, None, None]
            lse = tl.load(p_lse_e + row * H + (j // D)[None, None, :], mask=there, other=float("-inf"))
            part = tl.load(p_part_e + row * (H * D) + j[None, None, :], mask=there, other=0.0)
            m_new = tl.maximum(m_i, tl.max(lse, 0))
            share = tl.exp2(lse - m_new[None, :, :])
            before = tl.exp2(m_i - m_new)
            l_i = l_i * before + tl.sum(share, 0)
            acc = acc * before + tl.sum(share * part, 0)
            m_i = m_new
        o = acc / l_i + tl.load(p_bv + j).to(tl.float32)[None, :]
        wo = tl.load(p_wo + c[None, :] * (H * D) + j[:, None])  # [BJ, C]
        y = dot_add(o.to(wo.dtype), wo, y)
    valid = inside
    if HAS_MASK:
        valid = valid & (tl.load(p_mask + i_e * N + n, mask=inside, other=0) != 0)
    at = (i_e * N + n)[:, None] * C + c[None, :]
    y += tl.load(p_x + at, mask=valid[:, None], other=0.0).to(tl.float32)
    y += tl.load(p_bo + c).to(tl.float32)[None, :]
    y = tl.where(valid[:, None], norm(y, p_gamma, p_beta, eps, C), 0.0)
    if HAS_AFTER:
        y = y.to(p_out.dtype.element_ty).to(tl.float32)  # torch rounds between the norm and the sum
        y += tl.load(p_after + at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(p_out + at, y.to(p_out.dtype.element_ty), mask=inside[:, None])
