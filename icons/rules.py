"""Tables of exceptions that naming looks into: brands, flags, what single sets do to their identifiers."""

BRAND_LISTS = ("simple-icons", "logos", "fa7-brands", "bxl", "cib", "thesvg", "devicon")
# Companies that named themselves after things which icons show.
GENERIC_BRANDS = frozenset(
    "abstract affinity android app astro audio backstage bar beats bentobox billboard bit blueprint bluetooth "
    "book bookstack boots box brave buffer cash chart codeblocks coil coin comma composer contactless "
    "contactlesspayment coop correct court crowdsource cube cursor delta dev discourse discover do drizzle drone "
    "eclipse edge element engineering envelope eraser expo fax files fire flash flask flood flux foundation "
    "frigate ghost git glance glitch grab graph greenhouse harbor helix helpdesk hexagon hive home house icon "
    "insomnia json knowledgebase launchpad leaflet lens less letterbox lighthouse line linear list local location "
    "lock loom mail map mask matrix medium meteor metro microphone midi mix mixer modal monster nest nfc node not "
    "note nova open oracle org origin outline overcast package pandora pantheon payment peak pear periscope "
    "pinboard plume pocket podcast poetry polygon progress protect protractor pulse qr quest question racket "
    "radar rainbow react read readme reason relay ripple rss rtl ruby safari scan sensor serverless session "
    "shadow shell shortcut signal simple sketch slides snap snowflake socket spaceship spectrum spine spotlight "
    "spring square stack stage star steam stripe stylus sun svg swift switch tapas target task telegraph terminal "
    "thumbtack tide timescale title toggle toll track transmission treehouse trend tv unity usb vault vector "
    "verified vine visa watchtower wave web wifi wire wish x xml yarn zoom".split()
)
FLAG_SETS = frozenset({"circle-flags", "cif", "flag", "flagpack"})
NATIONS = {"eng": "1f3f4-e0067-e0062-e0065-e006e-e0067-e007f", "sct": "1f3f4-e0067-e0062-e0073-e0063-e0074-e007f",
           "wls": "1f3f4-e0067-e0062-e0077-e006c-e0073-e007f"}  # fmt: skip
# What single sets do to their identifiers, as patterns and replacements: bx holds its sisters bxl (logos) and bxs
# (solid) as well, Nest is a brand, counters are spelt out, and so on.
_AXES = (
    (r"-h(?=-filled$|-duotone$|-solid$|-light$|$)", "-horizontal"),
    (r"-v(?=-filled$|-duotone$|-solid$|-light$|$)", "-vertical"),
)
_GOOGLE = ((r"^nest-", "brand-"), (r"^local-(?!see)", ""))
_COUNTED = ((r"(?<=.)-(one|two|three|four|five)$", ""),)
SET_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "bx": (("^bxl-", "brand-"), ("^bxs?-", "")),
    "clarity": (
        (r"-solid-(badged|alerted)$", r"-\1-filled"),
        (r"-outline-(badged|alerted)$", r"-\1"),
        ("-line$", "-outline"),
    ),
    "dinkie-icons": ((r"-small(-filled)?$", r"\1"),),
    "emojione": ((r"^flag-for-(flag-)?", "flag-of-"),),
    "emojione-monotone": ((r"^flag-for-(flag-)?", "flag-of-"),),
    "fluent-mdl2": (("-solid$", "-filled"),),
    "garden": ((r"-fill-\d+$", "-filled"), (r"-stroke-\d+$", "-outlined")),
    "ic": ((r"^(\w+)-local-(?!see)", r"\1-"),),
    "ion": (("^(md|ios)-", ""),),
    "jam": (("-f$", "-filled"),),
    "nrk": (("-expressive$", ""),),
    "octicon": ((r"-fill-\d+$", "-filled"),),
    "osmic": ((r"-\d+$", ""),),
    "ph": ((r"-simple(?=-|$)", ""),),
    "solar": ((r"-minimalistic(?=-|$)", ""),),
    **{name: _GOOGLE for name in ("material-symbols", "material-symbols-light")},
    **{name: _COUNTED for name in ("icon-park", "icon-park-outline", "icon-park-solid", "icon-park-twotone")},
    **{name: _AXES for name in ("fa-solid", "fa6-solid", "fa7-solid", "gg", "reicon", "stash", "uil", "vaadin")},
}
# Folders and keywords of the clipart library that are too broad for a name.
BROAD = frozenset(
    "animals art astronomy buildings buttons cartoon communication computer computers containers decoration "
    "decorations dessert education electronics entertainment fantasy figure food games geography hardware hash "
    "holiday home household icons industrial mammals map medicine meeting menu music nature object objects office "
    "oceania party pattern people person plants protein recreation religion scenery science shape shapes sign "
    "signs simple sky special sport sports technology tool tools transport transportation travel utensils vehicle "
    "vehicles work animal building plant mammal christmas flag flags hand hands black white".split()
) | {"signs and symbols", "map symbols", "united states", "gradient", "led", "line art", "clip art"}
SET_STYLES = {
    "fluent-emoji-3d": "3d",
    "streamline-freehand-color": "hand-drawn",
    "pixel": "pixel",
    "pixelarticons": "pixel",
    "streamline-pixel": "pixel",
    "memory": "pixel",
    "dinkie-icons": "pixel",
    "openclipart": "clipart",
}
