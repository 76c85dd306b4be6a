"""The words of the world, each with its translation.

No Chinese noun begins with the character of an adjective, so that "大猫" has one reading.
"""

# class of thing -> English noun and Chinese noun; the order is part of the world
NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "animal": (
        ("cat", "猫"), ("dog", "狗"), ("horse", "马"), ("cow", "牛"), ("sheep", "羊"),
        ("pig", "猪"), ("rabbit", "兔子"), ("tiger", "老虎"), ("lion", "狮子"), ("monkey", "猴子"),
        ("bear", "熊"), ("fox", "狐狸"), ("wolf", "狼"), ("mouse", "老鼠"), ("duck", "鸭子"),
        ("hen", "母鸡"), ("bird", "鸟"), ("fish", "鱼"), ("frog", "青蛙"), ("snake", "蛇"),
        ("bee", "蜜蜂"), ("ant", "蚂蚁"),
    ),
    "food": (
        ("apple", "苹果"), ("pear", "梨"), ("banana", "香蕉"), ("peach", "桃子"), ("grape", "葡萄"),
        ("lemon", "柠檬"), ("bread", "面包"), ("rice", "米饭"), ("egg", "鸡蛋"), ("cake", "蛋糕"),
        ("soup", "汤"), ("noodle", "面条"), ("cheese", "奶酪"), ("potato", "土豆"), ("tomato", "番茄"),
        ("carrot", "胡萝卜"), ("candy", "糖果"), ("tea", "茶"),
    ),
    "clothing": (
        ("shirt", "衬衫"), ("coat", "外套"), ("hat", "帽子"), ("shoe", "鞋"), ("sock", "袜子"),
        ("skirt", "裙子"), ("glove", "手套"), ("scarf", "围巾"), ("belt", "腰带"), ("dress", "连衣裙"),
    ),
    "tool": (
        ("knife", "刀"), ("spoon", "勺子"), ("fork", "叉子"), ("cup", "杯子"), ("plate", "盘子"),
        ("pot", "锅"), ("hammer", "锤子"), ("needle", "针"), ("rope", "绳子"), ("ladder", "梯子"),
        ("brush", "刷子"), ("lamp", "灯"), ("pen", "钢笔"), ("pencil", "铅笔"), ("key", "钥匙"),
        ("clock", "钟"), ("box", "盒子"), ("bag", "包"),
    ),
    "vehicle": (
        ("car", "汽车"), ("bus", "公交车"), ("train", "火车"), ("ship", "船"), ("plane", "飞机"),
        ("bike", "自行车"), ("truck", "卡车"), ("boat", "艇"),
    ),
    "place": (
        ("school", "学校"), ("shop", "商店"), ("park", "公园"), ("farm", "农场"), ("bank", "银行"),
        ("library", "图书馆"), ("kitchen", "厨房"), ("garden", "花园"), ("street", "街道"), ("village", "村庄"),
        ("city", "城市"), ("bridge", "桥"), ("hotel", "酒店"), ("market", "市场"), ("station", "车站"),
        ("museum", "博物馆"),
    ),
    "plant": (
        ("tree", "树"), ("flower", "花"), ("grass", "草"), ("leaf", "叶子"), ("rose", "玫瑰"),
        ("bamboo", "竹子"), ("pine", "松树"), ("lotus", "荷花"),
    ),
    "furniture": (
        ("table", "桌子"), ("chair", "椅子"), ("bed", "床"), ("desk", "书桌"), ("shelf", "架子"),
        ("sofa", "沙发"), ("door", "门"), ("window", "窗户"),
    ),
}  # fmt: skip

CLASSES = {
    "animal": "动物", "food": "食物", "clothing": "衣物", "tool": "工具",
    "vehicle": "交通工具", "place": "地点", "plant": "植物", "furniture": "家具",
}  # fmt: skip

ADJECTIVES: tuple[tuple[str, str], ...] = (
    ("big", "大"), ("small", "小"), ("red", "红"), ("black", "黑"), ("white", "白"), ("green", "绿"),
    ("blue", "蓝"), ("new", "新"), ("old", "旧"), ("good", "好"), ("long", "长"), ("cold", "冷"),
)  # fmt: skip

NAMES: tuple[tuple[str, str], ...] = (
    ("Tom", "小明"), ("Anna", "小红"), ("Ben", "小刚"), ("Lucy", "小丽"), ("Jack", "小华"), ("Mary", "小芳"),
    ("Sam", "小军"), ("Kate", "小美"), ("Paul", "小强"), ("Lily", "小兰"), ("Mark", "小龙"), ("Rose", "小玉"),
)  # fmt: skip

# things one can own, for advice and for what must be refused
BELONGINGS: tuple[tuple[str, str], ...] = (
    ("bike", "自行车"), ("phone", "手机"), ("lamp", "灯"), ("coat", "外套"), ("clock", "钟"), ("bag", "包"),
    ("door", "门"), ("car", "汽车"), ("table", "桌子"), ("window", "窗户"),
)  # fmt: skip

DAYS: tuple[tuple[str, str], ...] = (
    ("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四"),
    ("Friday", "星期五"), ("Saturday", "星期六"), ("Sunday", "星期日"),
)  # fmt: skip

NOTES = ("do", "re", "mi", "fa", "sol", "la", "si")

PLANETS: tuple[tuple[str, str], ...] = (
    ("Mercury", "水星"), ("Venus", "金星"), ("Earth", "地球"), ("Mars", "火星"),
    ("Jupiter", "木星"), ("Saturn", "土星"), ("Uranus", "天王星"), ("Neptune", "海王星"),
)  # fmt: skip

LANGUAGES = ("en", "zh")


def all_nouns() -> list[tuple[str, str]]:
    """Every noun with its translation, in the world's order."""
    return [noun for nouns in NOUNS.values() for noun in nouns]


def in_language(pair: tuple[str, str], language: str) -> str:
    """The English or the Chinese half of a pair."""
    return pair[LANGUAGES.index(language)]


def class_of(english: str) -> str:
    """The class that an English noun belongs to."""
    return next(name for name, nouns in NOUNS.items() if any(english == noun for noun, _ in nouns))
