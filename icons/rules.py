"""Tables of exceptions: brands, flags, what single sets do to their identifiers, senses of words that icons mean."""

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
# The sense of WordNet 3.0 that icons mean where it is not the first that can be drawn; 0 where none is what they show.
_SENSES = """
    alien 3, arrow 1, attachment 0, avatar 0, back 0, banana 2, bank 9, barrel 2, bath 3, belt 2, biohazard 0,
    blind 3, bot 0, browser 0, build 0, bulb 2, button 2, cake 3, calculator 2, cape 2, cardinal 0, carousel 2,
    carrot 3, cast 0, chain 3, chat 0, cherry 3, chess 0, chicken 2, chip 7, christmas_tree 5, clown 2, cock 5,
    column 7, console 4, controller 3, copy 0, coral 4, corn 3, crane 4, crop 0, cross 2, crown 4, cut 0,
    dashboard 2, desktop 0, diamond 1, display 3, divide 0, divider 0, dome 4, down 0, draft 0, drag 0, drone 4,
    duplicate 0, earth 1, egg 2, exchange 0, export 0, favorite 0, female 2, font 0, food 2, forward 0, frame 10,
    galaxy 0, gallery 0, gem 5, ghost 3, glass 2, globe 3, glove 2, grid 0, group 0, gull 2, hammer 2, hanger 2,
    hash 0, heading 0, heart 7, help 0, highlighter 2, home 2, hood 8, hook 5, icon 0, import 0, inventory 0, iron
    4, jersey 3, joystick 2, kiwi 3, label 0, layer 0, letter 0, lighter 2, loader 0, loading 0, lobster 2, loop
    0, mail 0, male 2, mango 2, margin 0, medium 0, menu 0, microwave 2, mobile 0, monitor 4, moon 1, more 0,
    mouse 4, mug 4, mute 0, nail 2, needle 3, network 0, note 0, notebook 1, onion 3, open 0, outlet 2, pants 0,
    paste 0, peach 3, peacock 2, pepper 4, person 1, phoenix 3, picker 0, piece 0, pill 2, pin 9, pineapple 2,
    pinwheel 3, pipe 2, plant 2, plate 4, plug 5, poker 0, poll 0, pop 2, popcorn 2, power 0, press 3, printer 2,
    proxy 0, queen 2, racket 4, railway 2, record 0, ring 8, router 2, ruler 2, scale 7, scanner 2, scooter 3,
    screen 3, seal 9, server 3, setting 0, shape 0, shell 10, shrimp 3, shuttle 2, signal 0, siren 4, skirt 2,
    slider 0, socket 2, sort 0, sound 0, spa 3, speaker 2, spinner 0, stamp 8, staple 5, sticker 0, stock 0,
    stroller 2, sun 1, swallow 3, tab 0, tablet 0, tag 0, target 4, television 3, terminal 4, tiger 2, top 0,
    trailer 4, tram 3, transfer 0, turtle 2, tv 2, valve 3, van 5, variable 0, vault 2, volume 0, watermelon 2,
    web 0, whale 2, widget 0, witch 2, wizard 2, world 0
"""
ICON_SENSES = {word: int(sense) for word, sense in (pair.split() for pair in _SENSES.split(","))}
