"""Bugs for the emulator and the sanitizers to find; each is a textual change to one kernel source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bug:
    """A planted bug.

    Attributes:
        name: name of the bug.
        what: what is wrong, in words.
        file: path in csrc.
        before, after: text that occurs once in the file, and its replacement.
        part: sweep that runs the kernel: ``linear``, ``routing`` or ``experts``.
        found_by: lanes that must detect it. ``values``: wrong results on every schedule; ``values: ...``: on the
            schedules with this word in their name; ``error: ...``: the emulator stops with this message;
            ``address``, ``thread``: the sanitizer reports it; ``banks``: bank conflicts are counted.
    """

    name: str
    what: str
    file: str
    before: str
    after: str
    part: str
    found_by: tuple[str, ...]

    def plant(self, csrc: Path, overlay: Path) -> None:
        """Write the changed file to ``overlay``.

        Raises:
            ValueError: the text to change does not occur exactly once in the file.
        """
        text = (csrc / self.file).read_text()
        if text.count(self.before) != 1:
            raise ValueError(f"{self.name}: {self.before!r} occurs {text.count(self.before)} times in {self.file}")
        target = overlay / self.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace(self.before, self.after))


_ARRIVED = """    dev::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles have arrived, and nobody reads the stage that is loaded next
    if (step + kStages - 1 < steps) load(step + kStages - 1);
"""

BUGS = (
    Bug(
        "missing_barrier",
        "no barrier between the arrival of a stage and its use",
        "cuda/block_gemm.cuh",
        "    __syncthreads();  // this step's tiles have arrived",
        "    // this step's tiles have arrived",
        "linear",
        ("values", "thread"),
    ),
    Bug(
        "wait_count",
        "cp.async.wait_group leaves one group too many in flight",
        "cuda/block_gemm.cuh",
        "cp_async_wait<kStages - 2>",
        "cp_async_wait<kStages - 1>",
        "linear",
        ("values: lazy", "thread"),
    ),
    Bug(
        "stage_overwritten",
        "the next stage is loaded before the barrier, while other warps still read it",
        "cuda/block_gemm.cuh",
        _ARRIVED,
        """    dev::cp_async_wait<kStages - 2>();
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    __syncthreads();
""",
        "linear",
        ("values: eager", "thread"),
    ),
    Bug(
        "line_too_many",
        "one line past an operand's last one is copied",
        "cuda/linear/gradient.cuh",
        "[&](int s) { return s < rows ? from[s] : -1; }",
        "[&](int s) { return s <= rows ? from[s] : -1; }",
        "linear",
        ("address",),
    ),
    Bug(
        "half_the_steps",
        "the inner loop skips every other k-step",
        "cuda/block_gemm.cuh",
        "k < TileT::kK; k += F::kStep",
        "k < TileT::kK; k += 2 * F::kStep",
        "linear",
        ("values",),
    ),
    Bug(
        "row_too_many",
        "a block stores one row past its expert's",
        "cuda/block_gemm.cuh",
        "if (row >= rows || column >= columns) continue;\n    f(row",
        "if (row > rows || column >= columns) continue;\n    f(row",
        "linear",
        ("address",),
    ),
    Bug(
        "group_before",
        "of 32 groups at a time, a tile is counted from the first one's begin",
        "cuda/block_gemm.cuh",
        "    tile -= skipped;\n    if (before < 32) return first + before;\n",
        "    if (before < 32) return first + before;\n    tile -= skipped;\n",
        "experts",
        ("error: for one that has not run",),
    ),
    Bug(
        "no_padding",
        "rows of tiles in shared memory are not padded",
        "cuda/tile.cuh",
        "/ per_chunk | 1) * per_chunk",
        "/ per_chunk | 0) * per_chunk",
        "linear",
        ("banks",),
    ),
    Bug(
        "lane_map",
        "the matrices of an A fragment are taken in the wrong order",
        "cuda/tile.cuh",
        "const int dm = (part & 1) * 8, dk = (part >> 1) * 8;",
        "const int dm = (part >> 1) * 8, dk = (part & 1) * 8;",
        "linear",
        ("values",),
    ),
    Bug(
        "weight_not_completed",
        "what only completes the tile of a weight keeps what shared memory held",
        "cuda/linear/rebuilt.cuh",
        "for (int i = thread; i < kDepth * Tiles::kWeightStride;",
        "for (int i = kDepth * Tiles::kWeightStride; i < kDepth * Tiles::kWeightStride;",
        "linear",
        ("values",),
    ),
    Bug(
        "tile_not_completed",
        "what only completes the tile of a weight's gradient keeps what shared memory held",
        "cuda/linear/gradient.cuh",
        "for (int i = thread; i < kSide * Tiles::kStride;",
        "for (int i = kSide * Tiles::kStride; i < kSide * Tiles::kStride;",
        "linear",
        ("values",),
    ),
    Bug(
        "part_forgotten",
        "the last tile of a part is left out",
        "cuda/linear/gradient.cuh",
        "begin < end && step < last; ++step",
        "begin < end && step + 1 < last; ++step",
        "linear",
        ("values",),
    ),
    Bug(
        "rows_overwritten",
        "the next rows are looked up while other warps still read those before",
        "cuda/linear/grouped.cuh",
        "    __syncthreads();  // nobody reads the rows before\n",
        "",
        "linear",
        ("thread",),
    ),
    Bug(
        "rows_not_known",
        "rows are read before all have been looked up",
        "cuda/linear/grouped.cuh",
        "    __syncthreads();  // rows are known\n    if (owned) {",
        "    if (owned) {",
        "linear",
        ("thread",),
    ),
    Bug(
        "next_expert_s_rows",
        "a turned tile goes on into the rows of the next expert",
        "cuda/linear/grouped.cuh",
        "return FarRun{own[row], rows - row};",
        "return FarRun{own[row], 1};",
        "linear",
        ("values",),
    ),
    Bug(
        "row_of_another_slot",
        "gradients are read from the row of x",
        "cuda/linear/grouped.cuh",
        "from[1][row] = place(own, grads);",
        "from[1][row] = place(source, grads);",
        "linear",
        ("values",),
    ),
    Bug(
        "misaligned",
        "16 bytes at a time from addresses that are not multiples of 16",
        "cuda/dispatch.h",
        "reinterpret_cast<std::uintptr_t>(array) % 16 == 0;",
        "reinterpret_cast<std::uintptr_t>(array) % 2 == 0;",
        "linear",
        ("error: address is not 16-byte aligned",),
    ),
    Bug(
        "divergent_barrier",
        "threads without a pair skip the barriers of the others",
        "cuda/routing/routing.cuh",
        "    const int slot = rank_of(bin, bins, seen, counts);\n",
        "    const int slot = pair < pairs ? rank_of(bin, bins, seen, counts) : 0;\n",
        "routing",
        ("error: ",),
    ),
    Bug(
        "no_barrier_in_ranks",
        "counts of the warps are added before all have written theirs",
        "cuda/routing/routing.cuh",
        "static_cast<uint8_t>(__popc(same));\n  __syncthreads();\n",
        "static_cast<uint8_t>(__popc(same));\n",
        "routing",
        ("values: descending", "thread"),
    ),
    Bug(
        "unstable_scatter",
        "later pairs of a warp come first",
        "cuda/routing/routing.cuh",
        "__popc(same & ((1u << lane) - 1u))",
        "__popc(same & ~((2u << lane) - 1u))",
        "routing",
        ("values",),
    ),
    Bug(
        "past_shared_memory",
        "the last counts lie behind the block's shared memory",
        "cuda/routing/routing.cuh",
        "reinterpret_cast<uint8_t*>(keys + pairs);",
        "reinterpret_cast<uint8_t*>(keys + pairs + 1);",
        "routing",
        ("error: dynamic shared memory was written past its end", "address"),
    ),
    Bug(
        "past_the_row",
        "one column too many is stored",
        "cuda/routing/routing.cuh",
        """const int token = blockIdx.x, column = (blockIdx.y * kRouteThreads + threadIdx.x) * kPer;
  if (column >= columns) return;""",
        """const int token = blockIdx.x, column = (blockIdx.y * kRouteThreads + threadIdx.x) * kPer;
  if (column > columns) return;""",
        "routing",
        ("address",),
    ),
    Bug(
        "plain_increment",
        "a histogram in shared memory is not counted atomically",
        "cuda/routing/routing.cuh",
        "atomicAdd(seen + (p.keys && !p.by_choice ? p.keys[pair] : p.given_bin(pair)), 1);",
        "++seen[p.keys && !p.by_choice ? p.keys[pair] : p.given_bin(pair)];",
        "routing",
        ("thread",),
    ),
    Bug(
        "past_the_sums",
        "one sum too many is read from the block's array of them",
        "cuda/routing/routing.cuh",
        "w < kRouteWarps; ++w) total += partial[w];",
        "w <= kRouteWarps; ++w) total += partial[w];",
        "routing",
        ("address",),
    ),
    Bug(
        "hidden_not_whole",
        "hidden units are multiplied before all warps have stored theirs",
        "cuda/block_gemm.cuh",
        "  __syncthreads();  // stages free, resident operands written\n",
        "",
        "experts",
        ("thread",),
    ),
    Bug(
        "tile_overwrites_stages",
        "a tile is laid out in shared memory while other warps still read the last stage",
        "cuda/block_gemm.cuh",
        "  __syncthreads();  // nobody reads the buffer\n",
        "",
        "experts",
        ("thread",),
    ),
    Bug(
        "parts_not_whole",
        "gradients of gates are added up before all warps have stored their parts",
        "cuda/experts/rows.cuh",
        "    __syncthreads();  // parts are whole\n",
        "",
        "experts",
        ("thread",),
    ),
    Bug(
        "neighbour_expert",
        "a tile of slots goes on into those of the next expert",
        "cuda/experts/slots.cuh",
        "rows = p.end(choice, expert) - begin;",
        "rows = (choice + 1) * p.tokens - begin;",
        "experts",
        ("values: descending",),
    ),
    Bug(
        "out_of_turn",
        "tiles are taken in the order of their blocks' numbers, not in that in which blocks begin",
        "cuda/experts/slots.cuh",
        "shared().taken = dev::ticket(p.turns + group, tile);",
        "shared().taken = tile;",
        "experts",
        ("error: for one that has not run",),
    ),
    Bug(
        "choice_overwritten",
        "a later choice stores its rows instead of adding them",
        "cuda/experts/slots.cuh",
        "const bool later = choice > 0,",
        "const bool later = choice > 1,",
        "experts",
        ("values",),
    ),
    Bug(
        "past_the_weight",
        "a tile of a weight's gradient stores one row too many",
        "cuda/experts/weights.cuh",
        "if (i + row >= own.a.width || j",
        "if (i + row > own.a.width || j",
        "experts",
        ("address",),
    ),
    Bug(
        "share_forgotten",
        "the gradients of the last share of the groups are not added",
        "cuda/experts/weights.cuh",
        "for (int j = 0; j < p.count; ++j) sum",
        "for (int j = 0; j + 1 < p.count; ++j) sum",
        "experts",
        ("values",),
    ),
)
