"""What the demo model has names for: colours, shapes, places, in English and Chinese."""

from __future__ import annotations

from typing import Literal

Language = Literal["en", "zh"]

# Several shades of each colour: CSS names, plotting palettes, design systems. A drawn shade is a
# mixture of two of one colour, so no shade lies between two names.
SHADES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 20, 60), (214, 39, 40), (229, 57, 53), (200, 0, 0), (178, 34, 34)),
    "orange": ((255, 165, 0), (255, 127, 14), (255, 140, 0), (251, 140, 0), (255, 120, 0)),
    "yellow": ((255, 255, 0), (255, 221, 0), (255, 235, 59), (253, 224, 71), (240, 230, 20)),
    "green": ((0, 128, 0), (0, 255, 0), (44, 160, 44), (67, 160, 71), (34, 139, 34), (0, 200, 0),
              (50, 205, 50), (0, 100, 0)),
    "blue": ((0, 0, 255), (31, 119, 180), (30, 100, 229), (65, 105, 225), (0, 0, 180),
             (30, 144, 255), (0, 0, 139)),
    "purple": ((128, 0, 128), (148, 103, 189), (142, 36, 170), (138, 43, 226), (150, 0, 210),
               (102, 51, 153)),
    "pink": ((255, 192, 203), (255, 105, 180), (227, 119, 194), (255, 150, 190), (244, 143, 177)),
    "brown": ((165, 42, 42), (139, 69, 19), (140, 86, 75), (121, 85, 72), (120, 66, 18),
              (101, 67, 33)),
    "black": ((0, 0, 0), (20, 20, 20), (33, 33, 33)),
    "white": ((255, 255, 255), (250, 250, 250), (245, 245, 245)),
    "gray": ((128, 128, 128), (127, 127, 127), (150, 150, 150), (110, 110, 110), (158, 158, 158)),
    "cyan": ((0, 255, 255), (0, 220, 230), (23, 190, 207), (0, 206, 209), (64, 224, 220)),
}  # fmt: skip
COLOURS = tuple(SHADES)
COLOURS_ZH = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色", "brown": "棕色", "black": "黑色", "white": "白色",
    "gray": "灰色", "cyan": "青色",
}  # fmt: skip

SHAPES = (
    "circle", "square", "triangle", "rectangle", "star", "diamond", "heart", "cross", "oval",
    "pentagon", "hexagon",
)  # fmt: skip
SHAPES_ZH = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "rectangle": "长方形",
    "star": "五角星", "diamond": "菱形", "heart": "心形", "cross": "十字形", "oval": "椭圆形",
    "pentagon": "五边形", "hexagon": "六边形",
}  # fmt: skip
# Other words that a question may use; answers keep the names above.
SHAPE_SYNONYMS = {
    "circle": ("circle", "ball", "disc"), "diamond": ("diamond", "rhombus"),
    "oval": ("oval", "ellipse"), "cross": ("cross", "plus sign", "plus"),
}  # fmt: skip
SHAPE_SYNONYMS_ZH = {
    "circle": ("圆形", "圆", "圆圈"), "square": ("正方形", "方块", "方形"),
    "star": ("五角星", "星形", "星星"), "heart": ("心形", "爱心"), "rectangle": ("长方形", "矩形"),
    "cross": ("十字形", "十字", "加号"), "oval": ("椭圆形", "椭圆"),
}  # fmt: skip

PLACES = {
    "left": ("on the left", "左边"), "right": ("on the right", "右边"),
    "top": ("at the top", "上方"), "bottom": ("at the bottom", "下方"),
    "center": ("in the middle", "中间"), "top left": ("in the top left", "左上角"),
    "top right": ("in the top right", "右上角"), "bottom left": ("in the bottom left", "左下角"),
    "bottom right": ("in the bottom right", "右下角"),
}  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth")
ORDINALS_ZH = ("第一", "第二", "第三", "第四")
DIRECTIONS = {"left": "左", "right": "右", "up": "上", "down": "下"}

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WORDS = tuple(
    """ace act add age air all and ant any apple april arm art ask auto baby back bag ball band bank
    bar bath beach bear bed bee bell best bike bird black blue boat body bold book box boy brain
    bread brick brown bus busy cake call camp can candy car card care cash cat chair chat city clean
    clear clock cloud club coat code coffee cold cook cool corn cow cup dad dance dark data date day
    deep demo desk dog door down dream dress drink drive drop dry duck ear early earth east easy eat
    egg eight empty end enter eye exit face fact fall farm fast father film fine fire first fish five
    flag flat floor fly food foot fork four fox free fresh friday front fruit full fun game garden
    gas gate gift girl glass go goal gold good grape grass gray great green ground group hair half
    hall hand happy hard hat head heart heat heavy hello help here high hill home honey horse hot
    hotel house ice idea image inn iron jam jazz job join jump june july juice key kid kind king kite
    knife lake lamp land large last late law leaf left lemon less life light lime line lion list live
    lock logo long look love low luck lunch mail main man map march mark math max may meal menu milk
    min mind mode money month moon more mouse move movie music name near neck nest new news next nice
    night nine no nose note now nut ocean off office oil ok old on one onion open orange out oven
    page paint pan paper park party past peach pear pen pet phone photo piano pie pig pilot pink
    pizza plane plant plate play plus point pool post power press price print pull push queen quick
    quiet radio rain read ready red rest rice rich ride right ring river road robot rock room rose
    round run safe sail sale salt sand save school sea seat seed sell send seven shape share sheep
    shirt shoe shop short show sign silk sing six size sky sleep slow small smile snow soap sock soft
    song soon soup south space speed spoon sport star start step stop store storm story street sugar
    sun sweet swim table tail tall taxi tea team ten tent test text thank three ticket tiger time
    tin tip tiger toe tool top total tour town toy train tree truck true two under up use van view
    visit voice vote walk wall want warm wash watch water wave way web week west wet wheel white wide
    wild win wind wine wing winter wolf wood word work world yard year yellow yes you young zebra
    zero zone zoo""".split()  # noqa: E501, SIM905
)


def colour_name(colour: str, language: Language) -> str:
    """The colour's canonical word."""
    return colour if language == "en" else COLOURS_ZH[colour]


def shape_name(shape: str, language: Language) -> str:
    """The shape's canonical word."""
    return shape if language == "en" else SHAPES_ZH[shape]
