"""What is timed: cases in the notation of their own names, in named groups."""

from __future__ import annotations

import re
from dataclasses import dataclass

DTYPES = ("float16", "bfloat16", "float32")
LAYOUTS = ("BLHD", "BHLD")
MASKS = ("bool", "bias", "padding", "documents")


@dataclass(frozen=True)
class Case:
    B: int
    H: int
    Hkv: int
    L: int
    S: int
    E: int
    Ev: int
    dtype: str
    causal: bool = False
    # bool (B, 1, L, S), a fifth masked out; bias (1, H, L, S); padding: bool (B, 1, 1, S), three quarters of keys left;
    # documents: bool (B, 1, L, S), eight of one length that see their own keys alone
    mask: str | None = None
    dropout: float = 0.0
    layout: str = "BLHD"  # order in memory; attention always sees (B, H, L, D)
    backward: bool = False

    def __post_init__(self) -> None:
        if min(self.B, self.H, self.Hkv, self.L, self.S, self.E, self.Ev) < 1:
            raise ValueError(f"case '{self}': all sizes must be at least 1")
        if self.H % self.Hkv:
            raise ValueError(f"case '{self}': {self.H} query heads are no multiple of {self.Hkv} key heads")
        if self.causal and self.mask:
            raise ValueError(f"case '{self}': causal and a mask exclude each other")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"case '{self}': p must be in [0, 1]")

    def __str__(self) -> str:
        words = [
            f"B{self.B}",
            f"H{self.H}" if self.Hkv == self.H else f"H{self.H}/{self.Hkv}",
            f"L{self.L}",
            f"S{self.S}" if self.S != self.L else "",
            f"D{self.E}" if self.Ev == self.E else f"D{self.E}/{self.Ev}",
            self.dtype,
            "causal" if self.causal else "",
            f"mask={self.mask}" if self.mask else "",
            f"p={self.dropout:g}" if self.dropout else "",
            self.layout if self.layout != "BLHD" else "",
            "backward" if self.backward else "",
        ]
        return " ".join(word for word in words if word)

    @property
    def flops(self) -> float:
        """Two matmuls forward, five backward (2.5 x), half of the scores if causal; a mask changes nothing."""
        return 2 * self.B * self.H * self.L * self.S * (self.E + self.Ev) * (0.5**self.causal) * (2.5**self.backward)


def parse(text: str) -> Case:
    """'B4 H32/8 L4096 D128 bfloat16 causal' -> Case, the inverse of str(case)."""
    sizes: dict[str, tuple[int, int]] = {}
    words: dict[str, object] = {}
    for word in text.split():
        if size := re.fullmatch(r"([BLS])(\d+)|([HD])(\d+)(?:/(\d+))?", word):
            letter, first = size[1] or size[3], int(size[2] or size[4])
            sizes[letter] = (first, int(size[5] or first))
        elif word in DTYPES:
            words["dtype"] = word
        elif word in LAYOUTS:
            words["layout"] = word
        elif word in ("causal", "backward"):
            words[word] = True
        elif word.removeprefix("mask=") in MASKS and word.startswith("mask="):
            words["mask"] = word.removeprefix("mask=")
        elif re.fullmatch(r"p=(\d+\.?\d*|\.\d+)", word):
            words["dropout"] = float(word.removeprefix("p="))
        else:
            raise ValueError(
                f"'{word}' in case '{text}' is not understood: known are B1 H1 H8/2 L1 S1 D1 D192/128 p=0.1, "
                f"{', '.join(DTYPES)}, causal, backward, {', '.join(f'mask={mask}' for mask in MASKS)}, {LAYOUTS[1]}"
            )
    missing = [letter for letter in "BHLD" if letter not in sizes] + ([] if "dtype" in words else ["a dtype"])
    if missing:
        raise ValueError(
            f"'{text}' is no group ({', '.join(GROUPS_TEXT)}, all); as a case it lacks {', '.join(missing)}"
        )
    (B, _), (H, Hkv), (L, _), (E, Ev) = (sizes[letter] for letter in "BHLD")
    return Case(B, H, Hkv, L, sizes.get("S", (L, L))[0], E, Ev, **words)


GROUPS_TEXT = {
    # The seed's comparison, laid out as its script does.
    "seed": """
        B32 H32 L1024 D32 float16 BHLD
    """,
    "quick": """
        B4 H16 L4096 D128 bfloat16
        B4 H16 L4096 D128 bfloat16 causal
        B4 H32 L4096 D64 bfloat16 causal
        B4 H16 L4096 D128 bfloat16 causal backward
        B4 H16 L4096 D128 bfloat16 mask=bool
        B4 H16 L2048 D64 float32
        B16 H32/8 L1 S8192 D128 bfloat16
        B32 H8 L128 D64 float16
    """,
    "forward": """
        B32 H32 L1024 D32 float16
        B32 H8 L128 D64 float16
        B32 H32 L512 D64 bfloat16
        B32 H32 L512 D64 bfloat16 causal
        B8 H32 L2048 D64 bfloat16
        B4 H32 L4096 D64 bfloat16
        B4 H32 L4096 D64 bfloat16 causal
        B1 H32 L16384 D64 bfloat16
        B1 H32 L16384 D64 bfloat16 causal
        B32 H16 L512 D128 bfloat16
        B32 H16 L512 D128 bfloat16 causal
        B8 H16 L2048 D128 bfloat16 causal
        B4 H16 L4096 D128 bfloat16
        B4 H16 L4096 D128 bfloat16 causal
        B1 H16 L16384 D128 bfloat16
        B1 H16 L16384 D128 bfloat16 causal
        B32 H8 L512 D256 bfloat16
        B32 H8 L512 D256 bfloat16 causal
        B8 H8 L2048 D256 bfloat16
        B4 H8 L4096 D256 bfloat16
        B4 H8 L4096 D256 bfloat16 causal
        B1 H8 L16384 D256 bfloat16
        B1 H8 L16384 D256 bfloat16 causal
        B4 H16 L4096 D128 float16
    """,
    "backward": """
        B32 H32 L1024 D32 float16 backward
        B32 H32 L512 D64 bfloat16 backward
        B32 H32 L512 D64 bfloat16 causal backward
        B16 H32 L1024 D64 bfloat16 backward
        B4 H32 L4096 D64 bfloat16 backward
        B4 H32 L4096 D64 bfloat16 causal backward
        B1 H32 L16384 D64 bfloat16 backward
        B1 H32 L16384 D64 bfloat16 causal backward
        B32 H16 L512 D128 bfloat16 backward
        B32 H16 L512 D128 bfloat16 causal backward
        B16 H16 L1024 D128 bfloat16 causal backward
        B4 H16 L4096 D128 bfloat16 backward
        B4 H16 L4096 D128 bfloat16 causal backward
        B1 H16 L16384 D128 bfloat16 backward
        B1 H16 L16384 D128 bfloat16 causal backward
        B32 H8 L512 D256 bfloat16 backward
        B32 H8 L512 D256 bfloat16 causal backward
        B4 H8 L4096 D256 bfloat16 backward
        B4 H8 L4096 D256 bfloat16 causal backward
        B1 H8 L16384 D256 bfloat16 backward
        B1 H8 L16384 D256 bfloat16 causal backward
    """,
    "masks": """
        B4 H16 L4096 D128 bfloat16 mask=bool
        B4 H16 L4096 D128 bfloat16 mask=documents
        B4 H16 L4096 D128 bfloat16 mask=padding
        B4 H32 L4096 D64 bfloat16 mask=padding
        B8 H32 L2048 D64 bfloat16 mask=bias
        B4 H16 L4096 D128 bfloat16 mask=bool backward
        B4 H16 L4096 D128 bfloat16 mask=documents backward
        B8 H32 L2048 D64 bfloat16 mask=bias backward
    """,
    "dropout": """
        B32 H32 L1024 D32 float16 p=0.1
        B4 H32 L4096 D64 bfloat16 p=0.1
        B4 H16 L4096 D128 bfloat16 p=0.1
        B32 H32 L1024 D32 float16 p=0.1 backward
        B4 H32 L4096 D64 bfloat16 p=0.1 backward
        B4 H16 L4096 D128 bfloat16 p=0.1 backward
    """,
    "float32": """
        B4 H16 L2048 D64 float32
        B2 H16 L4096 D128 float32 causal
        B4 H16 L2048 D64 float32 backward
        B2 H16 L4096 D128 float32 causal backward
        B4 H16 L2048 D32 float32
        B4 H16 L2048 D32 float32 backward
        B4 H8 L2048 D256 float32
        B4 H8 L2048 D256 float32 backward
    """,
    "decode": """
        B1 H32/8 L1 S65536 D128 bfloat16
        B16 H32/8 L1 S8192 D128 bfloat16
        B1 H32/8 L1 S65536 D128 float32
        B16 H32/8 L1 S8192 D128 float32
    """,
    # Grouped heads and head dims that are no power of two, or unequal, or large.
    "shapes": """
        B4 H32 L4096 D128 bfloat16 causal
        B4 H32/8 L4096 D128 bfloat16 causal
        B4 H16 L4096 D192/128 bfloat16 causal
        B4 H16 L4096 D72 bfloat16
        B4 H16 L4096 D80 bfloat16
        B4 H16 L4096 D96 bfloat16
        B4 H16 L4096 D120 bfloat16
        B4 H16 L4096 D160 bfloat16
        B4 H16 L4096 D192 bfloat16
        B4 H16 L4096 D72 bfloat16 causal
        B4 H16 L4096 D80 bfloat16 causal
        B4 H16 L4096 D96 bfloat16 causal
        B4 H16 L4096 D120 bfloat16 causal
        B4 H16 L4096 D160 bfloat16 causal
        B4 H16 L4096 D192 bfloat16 causal
        B4 H16 L4096 D72 bfloat16 backward
        B4 H16 L4096 D80 bfloat16 backward
        B4 H16 L4096 D96 bfloat16 backward
        B4 H16 L4096 D120 bfloat16 backward
        B4 H16 L4096 D160 bfloat16 backward
        B4 H16 L4096 D192 bfloat16 backward
        B1 H1 L4096 D512 float16
        B4 H8 L4096 D512 float16
    """,
    # So small that the host decides: for python -m bench --host.
    "host": """
        B1 H8 L128 D64 float16
        B1 H8 L128 D64 float16 backward
    """,
    # Small enough for two cores.
    "cpu": """
        B2 H4 L512 D32 float16 BHLD
        B2 H4 L512 D64 float32
        B2 H4 L512 D64 bfloat16
        B2 H4 L1024 D64 float32 causal
        B2 H4 L512 D64 float32 mask=bool
        B2 H4 L512 D64 float32 mask=bias
        B2 H8/2 L512 D64 float32
        B1 H8 L1 S4096 D64 float32
        B2 H4 L512 D64 float32 p=0.1
        B2 H4 L512 D64 float32 backward
        B2 H4 L512 D64 float32 mask=bias backward
    """,
}
GROUPS = {name: tuple(parse(line) for line in text.split("\n") if line.strip()) for name, text in GROUPS_TEXT.items()}
# Everything for a GPU; the seed's case is there once in each layout.
GROUPS["all"] = tuple(
    dict.fromkeys(case for name, group in GROUPS.items() if name not in ("cpu", "host") for case in group)
)


def select(names: str) -> list[tuple[Case, ...]]:
    """'seed,B4 H16 L512 D64 float16' -> cases, each once, in the order given; those joined by & come together."""
    picked: list[tuple[Case, ...]] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        group = GROUPS.get(name)
        picked += [(case,) for case in group] if group else [tuple(map(parse, name.split("&")))]
    cases = list(dict.fromkeys(picked))
    if not cases:
        raise ValueError(f"no case in '{names}'")
    return cases
