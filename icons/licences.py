"""Which icon sets may be used: permissive licences only, no brands, nothing that leaks a held-out set.

The weights are Apache-2.0, so that every licence is on a list of permissive ones; whatever is not on the list, such as
non-commercial, share-alike, GPL, MPL and OFL sets, stays out. `reason_to_skip` is the whole rule.
"""

PERMISSIVE_LICENCES = frozenset(
    {"Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "Unlicense", "public domain"}
)

# Sets of logos, of file types named after products, and of the icons of one vendor's products.
BRAND_SETS = frozenset(
    "catppuccin devicon devicon-original devicon-plain fa-brands fa6-brands fa7-brands file-icons flat-ui gcp k8s "
    "material-icon-theme nonicons skill-icons unjs vscode-icons".split()
)

OTHER_SETS = {
    "fluent-emoji": "the same pictures as fluent-emoji-flat and the 3D set, slow to render",
    "line-md": "animated: the first frame is empty",
    "svg-spinners": "animated: the first frame is empty",
    "streamline-freehand": "the drawings of a held-out set",
}

# Held out whole: what a model makes of a style that it has never seen.
HELD_OUT_SETS = {"healthicons": "healthicons", "streamline-freehand-color": "freehand"}


def reason_to_skip(prefix: str, licence: str, category: str | None) -> str | None:
    """Why an icon set is left out, or None if it is used.

    Args:
        prefix: identifier of the set, for example `mdi`.
        licence: its SPDX identifier.
        category: the collection's own category of the set, for example `Logos`.
    """
    if licence not in PERMISSIVE_LICENCES:
        return f"licence {licence} is not on the list of permissive ones"
    if category == "Logos" or prefix in BRAND_SETS:
        return "logos and brands"
    return OTHER_SETS.get(prefix)
