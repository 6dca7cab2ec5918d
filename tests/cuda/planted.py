"""Bugs for the emulator and the sanitizers to find; each is a textual change to one kernel
source."""

import re
from dataclasses import dataclass

# The sweep that runs a file's kernels; of each bug its name, what is wrong, what must detect it,
# and the lines without (-) and with it (+). ``values``: wrong results on every schedule; ``values:
# ...``: on the schedules with this word in their name; ``error: ...``: the emulator stops with this
# message; ``address``, ``thread``: the sanitizer reports it; ``banks``: bank conflicts are
# counted.
PATCHES = r"""
@ cuda/block_gemm.cuh in linear
missing_barrier: no barrier between the arrival of a stage and its use [values, thread]
-    // This step's tiles have arrived, and nobody reads the stage that is loaded next.
-    __syncthreads();
wait_count: cp.async.wait_group leaves one group too many in flight [values: lazy, thread]
-cp_async_wait<kStages - 2>
+cp_async_wait<kStages - 1>
stage_overwritten: the next stage is loaded before the barrier, while other warps still read it [values: eager, thread]
-    dev::cp_async_wait<kStages - 2>();
-    // This step's tiles have arrived, and nobody reads the stage that is loaded next.
-    __syncthreads();
-    if (step + kStages - 1 < steps)
-      load(step + kStages - 1);
+    dev::cp_async_wait<kStages - 2>();
+    if (step + kStages - 1 < steps)
+      load(step + kStages - 1);
+    __syncthreads();
half_the_steps: the inner loop skips every other k-step [values]
-k < TileT::kK; k += F::kStep
+k < TileT::kK; k += 2 * F::kStep
row_too_many: a block stores one row past its expert's [address]
-    if (row >= rows || column >= columns)
-      continue;
-    f(row
+    if (row > rows || column >= columns)
+      continue;
+    f(row
group_before: of 32 groups at a time, a tile is counted from the first one's begin [values]
-    tile -= skipped;
-    if (is_here)
-      return first + before;
+    if (is_here)
+      return first + before;
+    tile -= skipped;
weight_not_whole: a tile of a weight is multiplied before all warps have stored theirs [thread]
-  __syncthreads();  // stages free, resident operands written
tile_overwrites_stages: a tile is laid out in shared memory while other warps still read the last stage [thread]
-  __syncthreads();  // nobody reads the buffer
@ cuda/linear/gradient.cuh in linear
line_too_many: one line past an operand's last one is copied [address]
-return s < rows ? from[s] : -1;
+return s <= rows ? from[s] : -1;
tile_not_completed: what only completes the tile of a weight's gradient keeps what shared memory held [values]
-for (int i = threadIdx.x; i < kSide * Tiles::kStride;
+for (int i = kSide * Tiles::kStride; i < kSide * Tiles::kStride;
part_forgotten: the last tile of a part is left out [values]
-begin < end && step < block.last; ++step
+begin < end && step + 1 < block.last; ++step
@ cuda/linear/tiles.cuh in linear
neighbour_expert: a tile of rows goes on into those of the next expert [values: descending]
-    rows = first(expert + 1) - begin < most ? first(expert + 1) - begin : most;
+    rows = of.slots - begin < most ? of.slots - begin : most;
@ cuda/tile.cuh in linear
no_padding: rows of tiles in shared memory are not padded [banks]
-/ per_chunk | 1) * per_chunk
+/ per_chunk | 0) * per_chunk
lane_map: the matrices of an A fragment are taken in the wrong order [values]
-    const int dm = (part & 1) * 8;
-    const int dk = (part >> 1) * 8;
+    const int dm = (part >> 1) * 8;
+    const int dk = (part & 1) * 8;
@ cuda/linear/rebuilt.cuh in linear
weight_not_completed: what only completes the tile of a weight keeps what shared memory held [values]
-for (int i = thread; i < kDepth * Tiles::kWeightStride;
+for (int i = kDepth * Tiles::kWeightStride; i < kDepth * Tiles::kWeightStride;
@ cuda/dispatch.h in linear
misaligned: 16 bytes at a time from addresses that are not multiples of 16 [error: address is not 16-byte aligned]
-reinterpret_cast<std::uintptr_t>(array) % 16 != 0
+reinterpret_cast<std::uintptr_t>(array) % 2 != 0
@ cuda/routing/routing.cuh in routing
divergent_barrier: threads without a pair skip the barriers of the others [error: ]
-    const int slot = rank_of(bin, bins, seen, counts);
+    const int slot = pair < pairs ? rank_of(bin, bins, seen, counts) : 0;
no_barrier_in_ranks: counts of the warps are added before all have written theirs [values: descending, thread]
-static_cast<uint8_t>(__popc(same));
-  __syncthreads();
+static_cast<uint8_t>(__popc(same));
unstable_scatter: later pairs of a warp come first [values]
-__popc(same & ((1u << lane) - 1u))
+__popc(same & ~((2u << lane) - 1u))
past_shared_memory: counts lie behind shared memory [error: dynamic shared memory was written past its end, address]
-reinterpret_cast<uint8_t*>(keys + pairs);
+reinterpret_cast<uint8_t*>(keys + pairs + 1);
past_the_row: one column too many is stored [address]
-  const int column = (blockIdx.y * kRouteThreads + threadIdx.x) * kPer;
-  if (column >= columns)
+  const int column = (blockIdx.y * kRouteThreads + threadIdx.x) * kPer;
+  if (column > columns)
plain_increment: a histogram in shared memory is not counted atomically [thread]
-atomicAdd(seen + bin, 1);
+++seen[bin];
past_the_sums: one sum too many is read from the block's array of them [address]
-for (int w = 0; w < kRouteWarps; ++w)
-      total += partial[w];
+for (int w = 0; w <= kRouteWarps; ++w)
+      total += partial[w];
"""


@dataclass(frozen=True)
class Bug:
    """A planted bug.

    Attributes:
        name: name of the bug.
        what: what is wrong, in words.
        file: path in csrc.
        part: sweep that runs the kernel: ``linear`` or ``routing``.
        before, after: text that occurs once in the file, and its replacement.
        found_by: lanes that must detect it, see `PATCHES`.
    """

    name: str
    what: str
    file: str
    part: str
    before: str
    after: str
    found_by: tuple[str, ...]

    def plant(self, csrc, overlay):
        """Write the changed file to ``overlay``.

        Raises:
            ValueError: the text to change does not occur exactly once in the file.
        """
        text = (csrc / self.file).read_text()
        if text.count(self.before) != 1:
            raise ValueError(
                f"{self.name}: {self.before!r} occurs {text.count(self.before)} times in {self.file}"
            )
        target = overlay / self.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace(self.before, self.after))


def _read(patches):
    for file, part, bugs in re.findall(
        r"^@ (\S+) in (\w+)\n((?:[^@].*\n)+)", patches, re.MULTILINE
    ):
        for name, what, lanes, old, new in re.findall(
            r"^(\w+): (.*) \[(.*)\]\n((?:-.*\n)+)((?:\+.*\n)*)", bugs, re.MULTILINE
        ):
            before, after = (
                "\n".join(line[1:] for line in lines.splitlines()) for lines in (old, new)
            )
            yield Bug(name, what, file, part, before, after, tuple(lanes.split(", ")))


BUGS = tuple(_read(PATCHES))
