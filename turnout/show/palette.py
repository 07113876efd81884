"""Colours that can be told apart, also by those who see red and green alike."""

from collections.abc import Sequence

__all__ = ["EXPERTS", "css", "expert_color", "run_color"]

# 64 colours for experts, each the farthest from all before it in OKLab, as seen normally and as simulated for
# protanopia, deuteranopia and (at a lower weight) tritanopia after Machado et al., 2009. The first few differ most.
# Where experts are many, colours repeat or come close: every use of them also shows the expert's number.
_LIGHT = """
2a6fb5 deba50 852a0f 38c2f0 b96f1a a7486a ea8195 6e2f74 7089de 44a567 3c509f 76d695 c36ca5 9c4414 baa737 30d8cf
8e3154 b8554d 55a4cf 984d8d de7b60 49b9bc b46981 dfa46d 168247 19b38f 78406f 8c71c7 56398a 2292a9 949346 a05f88
306531 b78511 7e2756 355fab b99623 66aaf5 85448b b571bb f48dae 7b95ea 99d079 91361c 9a3c5f c56157 ac6402 6aca8a
b35375 a5540a c97abc 6a4090 9d5ba3 486e31 6e3d38 c6b345 69cee7 a278cd d18178 c8a3cb 44895b 884972 6174b3 b57d86
""".split()
# The same hues and order, lifted for a dark background.
_DARK = """
4386cf f5d068 9f4229 70d7fe d28638 c15f80 ff9bac 86468c 86a0f7 5dbd7d 5167b9 8dedab dc83bc b65c30 d1be51 53efe6
a8496b d26c62 6cbbe7 b163a5 f79176 63d0d4 cd7f97 f7ba83 37995d 41cba6 905787 a387e0 6c50a3 41a9c1 abaa5d b876a0
477d47 cf9c35 983f6c 4b77c5 d1ac41 8ac1fe 9d5ba3 cd88d3 ffadc5 93adfd afe88f ac4d34 b45475 df786d c57b2b 81e1a0
cd6a8b be6b2c e291d4 8157a9 b571bb 5e8647 87534d ddca5e 81e5fe b98fe6 ea988e e0b9e2 5ba071 a16089 778bcc cd939c
""".split()
EXPERTS = len(_LIGHT)
# Runs, and policies of a cache, of which there are nine: the colours of Okabe and Ito, 2008, and three more; lighter
# ones for a dark background.
_RUNS_LIGHT = "0072b2 d55e00 009e73 b0568c a67c00 3e8fc4 8f1d1d 5b3fa0 5f6b73".split()
_RUNS_DARK = "56b4e9 ff8f4d 35c59a e39ac3 f0b73c 9fd3f5 ff6b6b a58cf0 b4bec6".split()


def css(num_experts: int) -> str:
    """The custom properties ``--e0``, ``--e1``, ... of experts and ``--r0``, ... of runs, light and dark."""
    count = min(num_experts, len(_LIGHT))
    light = _properties("e", _LIGHT[:count]) + _properties("r", _RUNS_LIGHT)
    dark = _properties("e", _DARK[:count]) + _properties("r", _RUNS_DARK)
    return f":root{{{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def expert_color(expert: int) -> str:
    """The custom property of an expert's colour."""
    return f"var(--e{expert % len(_LIGHT)})"


def run_color(run: int) -> str:
    """The custom property of a run's colour."""
    return f"var(--r{run % len(_RUNS_LIGHT)})"


def _properties(letter: str, colors: Sequence[str]) -> str:
    return "".join(f"--{letter}{index}:#{color};" for index, color in enumerate(colors))
