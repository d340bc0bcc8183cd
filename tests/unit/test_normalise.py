"""Text normalisation: what hard lines become, and what holds for every line. About 7 s."""

import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from cmkt.errors import CmktError
from cmkt.linguistic.config import read_config
from cmkt.linguistic.normalise import NORMALISERS, check_normaliser, make_normaliser

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

ENGLISH = {
    # apostrophes and quotation marks
    "Don't!": "don't",
    "rock 'n' roll": "rock 'n' roll",
    "O’Brien’s hat": "o'brien's hat",
    "The boys' house": "the boys' house",
    "‘The boys’ he said": "the boys he said",
    "\"Yes,\" he said, 'no.'": "yes he said no",
    "'Tis well-known": "'tis well known",
    # numbers
    "3.5%": "three point five percent",
    "0.50": "zero point five zero",
    "$5": "five dollars",
    "$1": "one dollar",
    "$1,234.56": "one thousand two hundred and thirty four dollars and fifty six cents",
    "£0.99": "ninety nine pence",
    "$3.5 million": "three point five million dollars",
    "1,000,000": "one million",
    "in 1990": "in nineteen ninety",
    "the 1990s": "the nineteen nineties",
    "the '80s, the 80's": "the eighties the eighties",
    "21st": "twenty first",
    "10:30": "ten thirty",
    "10:05 p.m.": "ten oh five pm",
    "at 10:00.": "at ten o'clock",
    "2026-11-24": "november twenty fourth twenty twenty six",
    "5-10 people, 10%–20%": "five to ten people ten percent to twenty percent",
    "-5°C": "minus five degrees c",
    "½ or 3/4": "one half or three fourths",
    "007": "zero zero seven",
    "call 555-0123": "call five five five zero one two three",
    "2125550123": "two one two five five five zero one two three",
    "GPT-4, MP3s, 5km": "gpt four mp three s five km",
    "10²": "ten two",
    "９９ and १२": "ninety nine and twelve",
    # acronyms, symbols, scripts
    "the U.S.A. and the U.S.": "the usa and the us",
    "AT&T": "at and t",
    "https://example.com/a1": "https example com a one",
    "mail a_b@example.com": "mail a b at example com",
    "hi 😀👨‍👩‍👧 3️⃣": "hi three",
    "Café cafe\u0301 naïve": "café café naïve",
    "他 said ‘你好’ in 2024年": "他 said 你好 in twenty twenty four 年",
    "ＡＢＣ": "abc",
    "a\u00adb c\u200bd": "ab cd",
    "wait... what…": "wait what",
    "tab\tand\nline\u3000": "tab and line",
    # nothing said
    "": "",
    " \n ": "",
    "…!? 😀 — %": "",
}

MANDARIN = {
    "2024年1月5日": "二零二四年一月五日",
    "2026-11-24": "二零二六年十一月二十四日",
    "第3名": "第三名",
    "３５％": "百分之三十五",
    "5%-10%": "百分之五到百分之十",
    "我有3.5个": "我有三点五个",
    "2个，20多岁": "两个二十多岁",
    "10:30": "十点三十分",
    "１，０００，０００人": "一百万人",
    "电话：13812345678": "电话幺三八幺二三四五六七八",
    "½": "二分之一",
    "-5℃": "负五摄氏度",
    "9" * 20: "九" * 20,
    "你 好 ， 世 界": "你好世界",
    "你好，Hello　World！真的": "你好hello world真的",
    "他说：‘好。’": "他说好",
    '他说"有3个"\\3': "他说有三个三",
    "don’t 说": "don't说",
    "用iPhone 15 拍照": "用iphone十五拍照",
    "GPT-4和MP3": "gpt四和mp三",
    "U.S.A.的3人": "usa的三人",
    "《红楼梦》……😀3️⃣": "红楼梦三",
    "〇々": "〇々",
    "": "",
    "……。 🎉": "",
}


@pytest.fixture(scope="module")
def normalisers():
    """Every combination of options that changes how the parts interact."""
    made = {"none": make_normaliser("none", {}), "lower": make_normaliser("lower", {})}
    for name in ("english", "mandarin"):
        common = {key: NORMALISERS[name][key] for key in ("case", "punctuation", "numbers")}
        for values in product(*common.values()):
            conf = dict(zip(common, values, strict=True))
            made[f"{name} {conf}"] = make_normaliser(name, conf)
    for conf in (
        {"script": "simplified", "spaces": "keep"},
        {"script": "traditional"},
        {"pinyin": True},
        {"pinyin": True, "punctuation": "keep", "numbers": "keep", "script": "simplified"},
    ):
        made[f"mandarin {conf}"] = make_normaliser("mandarin", conf)
    return made


@pytest.mark.parametrize(("text", "spoken"), ENGLISH.items())
def test_english(text, spoken):
    assert make_normaliser("english", {})(text) == spoken


@pytest.mark.parametrize(("text", "spoken"), MANDARIN.items())
def test_mandarin(text, spoken):
    assert make_normaliser("mandarin", {})(text) == spoken


@pytest.mark.parametrize(
    ("name", "conf", "text", "expected"),
    [
        ("none", {}, " Ａ’s 5% ", " Ａ’s 5% "),
        ("lower", {}, "DON'T", "don't"),
        ("english", {"case": "keep"}, "Mr. O'Brien, 2026-01-02", "Mr O'Brien January second "
         "twenty twenty six"),
        ("english", {"punctuation": "keep"}, "“Wait,” he said: 5!", "“wait,” he said: five!"),
        ("english", {"numbers": "keep"}, "$5.50, -3.5% (at 10:30), 1,000.",
         "$5.50 -3.5% at 10:30 1,000"),
        ("mandarin", {"numbers": "keep"}, "第３名，3.5％。", "第3名3.5%"),
        ("mandarin", {"case": "keep", "punctuation": "keep"}, "看ＢＢＣ，好。 啊",
         "看BBC,好。啊"),
        ("mandarin", {"spaces": "keep"}, "看 BBC  了", "看 bbc 了"),
        ("mandarin", {"script": "simplified"}, "乾隆皇帝的乾糧", "乾隆皇帝的干粮"),
        ("mandarin", {"script": "traditional"}, "发现头发，20000個", "發現頭髮兩萬個"),
        ("mandarin", {"script": "traditional"}, "說明了", "說明了"),
        ("mandarin", {"pinyin": True}, "绿色的iPhone，3个吗？",
         "lv4 se4 de5 iphone san1 ge4 ma5"),
    ],
)  # fmt: skip
def test_options(name, conf, text, expected):
    assert make_normaliser(name, conf)(text) == expected


def real_lines():
    return [
        line.split(maxsplit=1)[1]
        for path in sorted(SHARED.glob("*/text"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def random_lines():
    """Lines of characters that meet badly, and every kind of character between letters."""
    characters = "0123456789年月日:.-/%$,，\"\\'’‘{}个后 é&s°⁄nthA\u0301\u200dİ😀"
    generator = random.Random(0)
    lines = ["".join(generator.choices(characters, k=generator.randint(1, 12))) for _ in range(100)]
    return lines + [
        f"a{chr(code)}b '{chr(code)}'s 5{chr(code)}6" for code in range(0, 0x20000, 797)
    ]


def test_twice_equals_once(normalisers):
    lines = [*ENGLISH, *MANDARIN, *random_lines()]
    for name, normalise in normalisers.items():
        once = [normalise(line) for line in lines]
        assert [normalise(line) for line in once] == once, name


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real transcripts")
def test_real_transcripts(normalisers):
    """Transcripts of read speech are normal already, but for case and odd spaces."""
    lines = real_lines()
    assert len(lines) > 1000
    for name, normalise in normalisers.items():
        once = [normalise(line) for line in lines]
        assert [normalise(line) for line in once] == once, name
        if name.startswith("english") or name == "lower":
            english = [pair for pair in zip(lines, once, strict=True) if pair[0].isascii()]
            assert all(" ".join(line.lower().split()) == new.lower() for line, new in english)
        assert all(once)


def test_dropped_means_dropped():
    """Words and nothing else: neither digits nor marks, single spaces."""
    for name in ("english", "mandarin"):
        normalise = make_normaliser(name, {})
        for line in map(normalise, random_lines()):
            assert not any(character.isdecimal() for character in line)
            assert not set(line) & set('.,:-/%$"\\{}&°⁄，’‘😀\u200d')
            assert line == " ".join(line.split())


@pytest.mark.parametrize("module", ["wetext", "opencc", "pypinyin"])
def test_missing_library_is_told_before_any_text(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CmktError, match=rf"{module} \(pip install 'cmkt\[mandarin\]'\)"):
        make_normaliser("mandarin", {"script": "simplified", "pinyin": True})
    unneeded = {"numbers": "keep"} if module == "wetext" else {}
    assert make_normaliser("mandarin", unneeded)("你好，") == "你好"


@pytest.mark.parametrize(
    ("name", "conf", "told"),
    [
        ("upper", {}, "normaliser: 'upper' is not one of none, lower, english, mandarin"),
        ("lower", {"case": "keep"}, "lower has no option 'case'"),
        ("english", {"pinyin": True}, "english has no option 'pinyin'.*case, punctuation"),
        ("english", {"case": "upper"}, "case: 'upper' is not one of lower, keep"),
        ("english", {"numbers": False}, "numbers: False is not one of words, keep"),
        ("english", {"numbers": ["words"]}, "numbers: .* is not one of words, keep"),
        ("mandarin", {"pinyin": 1}, "pinyin: 1 is not one of False, True"),
        ("mandarin", {"pinyin": "true"}, "pinyin: 'true' is not one of False, True"),
    ],
)
def test_wrong_configuration(name, conf, told):
    for use in (check_normaliser, make_normaliser):
        with pytest.raises(CmktError, match=told):
            use(name, conf)


def test_wrong_option_names_its_line(tmp_path):
    path = tmp_path / "llm.yaml"
    path.write_text("model: x\nnormaliser: english\nnormaliser_conf: {case: upper}\n")
    with pytest.raises(CmktError, match=rf"{path}:3: normaliser_conf: case: 'upper'"):
        read_config(path)


def test_checking_imports_no_library():
    check = (
        "import sys; from cmkt.linguistic.normalise import check_normaliser as c;"
        "c('mandarin', {'pinyin': True}); c('english', {});"
        "sys.exit(bool({'wetext', 'opencc', 'pypinyin', 'num2words'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
