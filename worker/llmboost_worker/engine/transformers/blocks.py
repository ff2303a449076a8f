"""Which blocks of the key/value cache belong to which sequence, and which tokens they hold. No tensors here.

A block has room for a fixed number of tokens. Once all of its tokens are computed it is registered under the
hash of everything up to its end, so whoever comes with the same beginning finds it: the next turn of a
conversation, a resumed job, a sequence that gave way, a request with the same system prompt. What nobody uses
stays registered until its memory is needed; of that the least recently used goes first, and of one sequence's
blocks the last before the first, since a block is of no use without those before it.

Block 0 belongs to nobody: tables are padded with it, so what pads never points into a sequence's own memory.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_SIZE = 16
"""Tokens per block."""

NOBODYS = 0
"""The block that pads tables."""


class CacheFull(Exception):
    """There aren't as many free blocks."""


class BlockTable:
    """The blocks of one sequence, in the order of its tokens. Only `BlockManager` changes it."""

    __slots__ = ("blocks", "hashes", "num_registered")

    def __init__(self) -> None:
        self.blocks = array("i")
        self.hashes: list[bytes] = []
        """Of the sequence's full blocks, as far as they were needed. They outlive its blocks."""
        self.num_registered = 0
        """How many of its blocks, from the first, can be found by others (or have a twin that can)."""


class BlockManager:
    """All blocks: free, in use, or registered and in use by nobody."""

    def __init__(
        self, num_blocks: int, block_size: int = BLOCK_SIZE, enable_prefix_caching: bool = True
    ) -> None:
        """`num_blocks` includes nobody's."""
        self.block_size = block_size
        self.num_blocks = num_blocks - 1
        """That can be given out."""
        self._enable_prefix_caching = enable_prefix_caching
        self._users = [0] * num_blocks
        """By block: the tables that it is in."""
        self._free = list(range(num_blocks - 1, NOBODYS, -1))
        """Hold nothing that can be found. The last is taken first: memory never used stays untouched."""
        self._registered: dict[bytes, int] = {}
        """Blocks by the hash of all tokens up to their end."""
        self._hashes: dict[int, bytes] = {}
        """The other way round."""
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Registered blocks that are in no table; the first is the next to go."""
        self._under_way: dict[bytes, BlockTable] = {}
        """Hashes of the blocks that sequences are about to compute, and whose they will be."""

    @property
    def num_free(self) -> int:
        """Blocks that could be given out now."""
        return len(self._free) + len(self._unused)

    @property
    def num_used(self) -> int:
        """Blocks in use by some sequence."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, table: BlockTable, tokens: list[int]) -> list[int]:
        """The registered blocks that hold the beginning of `tokens`; never all of it: the last token must be
        computed, to know what follows it."""
        if not self._enable_prefix_caching:
            return []
        longest = (len(tokens) - 1) // self.block_size
        self._hash(table, tokens, longest)
        found = []
        for digest in table.hashes[:longest]:
            block = self._registered.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def computed_by(self, table: BlockTable, tokens: list[int]) -> BlockTable | None:
        """Whose sequence is computing, at this moment, the first block that `find` doesn't find."""
        found = len(self.find(table, tokens))
        longest = (len(tokens) - 1) // self.block_size
        return self._under_way.get(table.hashes[found]) if found < min(longest, len(table.hashes)) else None

    def allocate(self, table: BlockTable, tokens: list[int], spare: int = 0, reuse: bool = True) -> int:
        """Blocks for all of `tokens`, in an empty table; registered ones first, if `reuse`.

        Args:
            spare: blocks that must be left over.

        Returns:
            how many tokens the registered blocks hold.

        Raises:
            CacheFull: nothing has changed.
        """
        found = self.find(table, tokens) if reuse else []
        missing = self.blocks_for(len(tokens)) - len(found)
        unused = sum(not self._users[block] for block in found)
        if missing + unused + spare > self.num_free:
            raise CacheFull(f"{missing + unused + spare} blocks are needed, {self.num_free} are free")
        for block in found:
            self._unused.pop(block, None)
            self._users[block] += 1
        table.blocks.extend(found)
        table.num_registered = len(found)
        self._take(table, missing)
        if self._enable_prefix_caching:
            self._hash(table, tokens, len(tokens) // self.block_size)
            for digest in table.hashes[len(found) :]:
                self._under_way.setdefault(digest, table)
        return len(found) * self.block_size

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Makes room for `num_tokens` in all.

        Raises:
            CacheFull: nothing has changed.
        """
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > self.num_free:
            raise CacheFull(f"{missing} blocks are needed, {self.num_free} are free")
        self._take(table, missing)

    def register(self, table: BlockTable, tokens: list[int], num_computed: int) -> None:
        """Lets others find the blocks that `num_computed` sound tokens fill."""
        full = num_computed // self.block_size
        if full <= table.num_registered or not self._enable_prefix_caching:
            return
        self._hash(table, tokens, full)
        for index in range(table.num_registered, full):
            digest, block = table.hashes[index], table.blocks[index]
            if self._under_way.get(digest) is table:
                del self._under_way[digest]
            # If it is registered already, two sequences have computed it, and one copy is enough to find.
            if self._registered.setdefault(digest, block) == block:
                self._hashes[block] = digest
        table.num_registered = full

    def unregistered(self, table: BlockTable) -> list[int]:
        """The table's blocks that nobody else has, or can find."""
        return [block for block in table.blocks if block not in self._hashes]

    def free(self, table: BlockTable) -> None:
        """Empties the table."""
        for digest in table.hashes[table.num_registered :]:
            if self._under_way.get(digest) is table:
                del self._under_way[digest]
        for block in reversed(table.blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._hashes:
                self._unused[block] = None
            else:
                self._free.append(block)
        del table.blocks[:]
        table.num_registered = 0

    def _take(self, table: BlockTable, count: int) -> None:
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._unused.popitem(last=False)
                del self._registered[self._hashes.pop(block)]
            self._users[block] = 1
            table.blocks.append(block)

    def _hash(self, table: BlockTable, tokens: Sequence[int], count: int) -> None:
        """Sees to it that the table has the hashes of the first `count` blocks."""
        size = self.block_size
        for index in range(len(table.hashes), count):
            parent = table.hashes[-1] if table.hashes else b""
            own = array("q", tokens[index * size : (index + 1) * size]).tobytes()
            table.hashes.append(blake2b(parent + own, digest_size=16).digest())
