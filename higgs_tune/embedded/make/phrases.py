"""Texts for pretraining: everyday sentences and made-up words in seven languages, none of them Arabic.

Only the sound of a made-up word hints at its spelling, so such words teach the base to listen.
"""

# ruff: noqa: E501 - lists of words
import itertools
import random
import unicodedata

# Subjects, verbs, objects (in the order of each language) and endings; every combination is a sentence.
_PARTS: dict[str, tuple[str, str, str, str]] = {
    "es": (
        "mi hermano|la vecina|el maestro|tu amiga|mi padre|la doctora|el chico|ella|nadie|la abuela|don pedro|el perro",
        "busca|quiere|tiene|compra|lleva|encuentra|mira|deja|olvida|prefiere|trae|necesita",
        "la llave|el libro|una manzana|el coche|agua fría|pan caliente|la puerta|un regalo|la silla verde|el zapato"
        "|dos huevos|la carta|el queso|un paraguas|la guitarra|flores rojas|el mapa|jugo de naranja|la leche|un caballo",
        "|hoy|ahora|en casa|mañana|otra vez",
    ),
    "it": (
        "mio fratello|la vicina|il maestro|la ragazza|mio padre|il medico|lei|nessuno|la nonna|il gatto|marco|mia zia",
        "cerca|vuole|compra|porta|trova|guarda|lascia|dimentica|prende|chiede|vende|conosce",
        "la chiave|il libro|una mela|la macchina|acqua fresca|pane caldo|la porta|un regalo|la sedia|le scarpe"
        "|due uova|una lettera|il formaggio|l'ombrello|la chitarra|fiori gialli|la mappa|un gelato|il latte|lo specchio",
        "|oggi|adesso|a casa|domani|ancora",
    ),
    "de": (
        "mein bruder|die nachbarin|der lehrer|deine freundin|mein vater|die ärztin|das kind|sie|niemand|die oma|der hund|peter",
        "sucht|will|kauft|bringt|findet|sieht|vergisst|holt|braucht|nimmt|verkauft|trägt",
        "den schlüssel|das buch|einen apfel|das auto|kaltes wasser|warmes brot|die tür|ein geschenk|den stuhl|die schuhe"
        "|zwei eier|den brief|käse|den schirm|die gitarre|rote blumen|die karte|saft|frische milch|ein pferd",
        "|heute|jetzt|zu hause|morgen|wieder",
    ),
    "id": (
        "kakak saya|tetangga|guru itu|teman kamu|ayah|dokter|anak kecil|dia|nenek|kucing|budi|paman",
        "mencari|mau|membeli|membawa|melihat|lupa|mengambil|perlu|menjual|suka|meminta|menyimpan",
        "kunci rumah|buku itu|apel merah|mobil baru|air dingin|roti|pintu|hadiah|kursi|sepatu hitam"
        "|dua telur|surat|keju|payung|gitar|bunga kuning|peta|jus jeruk|susu|kuda putih",
        "|hari ini|sekarang|di rumah|besok|lagi",
    ),
    "en": (
        "my brother|the neighbour|our teacher|your friend|her father|the doctor|the child|she|nobody|grandma|the dog|peter",
        "finds|wants|buys|brings|sees|forgets|takes|needs|sells|keeps|likes|drops",
        "the key|a book|green apples|the car|cold water|warm bread|the door|a present|the chair|black shoes"
        "|two eggs|a letter|some cheese|an umbrella|the guitar|red flowers|the map|orange juice|fresh milk|a horse",
        "|today|now|at home|tomorrow|again",
    ),
    "tr": (
        "kardeşim|komşu|öğretmen|arkadaşın|babam|doktor|çocuk|o|kimse|ninem|köpek|ayşe",
        "anahtarı|kitabı|elmayı|arabayı|soğuk suyu|sıcak ekmeği|kapıyı|hediyeyi|sandalyeyi|ayakkabıyı"
        "|iki yumurtayı|mektubu|peyniri|şemsiyeyi|gitarı|çiçeği|haritayı|meyve suyunu|sütü|beyaz atı",
        "arıyor|istiyor|alıyor|getiriyor|buluyor|görüyor|unutuyor|taşıyor|satıyor|seviyor|saklıyor|bekliyor",
        "|bugün|şimdi|evde|yarın|yine",
    ),
    "fi": (
        "veljeni|naapuri|opettaja|ystäväsi|isä|lääkäri|lapsi|hän|mummo|koira|pekka|täti",
        "näkee|löytää|ostaa|tuo|unohtaa|ottaa|tarvitsee|myy|vie|pudottaa|antaa|saa",
        "avaimen|kirjan|omenan|auton|kylmän juoman|lämpimän leivän|oven|lahjan|tuolin|mustat kengät"
        "|kaksi munaa|kirjeen|juuston|sateenvarjon|kitaran|keltaisen kukan|kartan|pullan|maidon|hevosen",
        "|tänään|nyt|kotona|huomenna|taas",
    ),
}  # fmt: skip
LANGUAGES = tuple(_PARTS)
# Onsets, vowels and codas, spelled in each language so that espeak-ng reads them as written.
_SYLLABLES: dict[str, tuple[str, str, str]] = {
    "es": ("b c d f g l m n p r s t v ch ll ñ j br tr pl", "a e i o u á é ó", "- - - n s r l"),
    "it": ("b c d f g l m n p r s t v z tr br pr gn st", "a e i o u", "- - - - n r l"),
    "de": ("b d f g h k l m n p r s t w sch z br tr fl", "a e i o u au ei ä ö ü", "- - n r ch t m"),
    "id": ("b c d g h j k l m n p r s t y ny ng w", "a e i o u", "- - - n ng k h r"),
    "en": ("b d f g h k l m n p r s t w sh ch tr bl st", "a e i o u ee oo ai", "- n t k l m sh p"),
    "tr": ("b c ç d f g h k l m n p r s ş t v y z", "a e ı i o ö u ü", "- - - n r l k ş"),
    "fi": ("h j k l m n p r s t v", "a e i o u y ä ö aa ee ii uu ää", "- - - n s l t"),
}


def _sentences(language: str) -> list[str]:
    parts = [column.split("|") for column in _PARTS[language]]
    return [" ".join(words).strip() for words in itertools.product(*parts)]


def _made_up_phrase(language: str, rng: random.Random) -> str:
    onsets, vowels, codas = (inventory.split() for inventory in _SYLLABLES[language])

    def word() -> str:
        num_syllables = rng.choices((1, 2, 3), (2, 5, 3))[0]
        syllables = [
            rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas).strip("-")
            for _ in range(num_syllables)
        ]
        return "".join(syllables)

    return " ".join(word() for _ in range(rng.randint(2, 4)))


def phrases(language: str, num: int, made_up_share: float, seed: int) -> list[str]:
    """Return `num` different lower-case NFC texts without punctuation, a share of them of made-up words."""
    rng = random.Random(f"{seed}-{language}")
    num_made_up = round(num * made_up_share)
    texts = dict.fromkeys(rng.sample(_sentences(language), num - num_made_up))
    while len(texts) < num:
        texts[_made_up_phrase(language, rng)] = None
    shuffled = [unicodedata.normalize("NFC", text) for text in texts]
    rng.shuffle(shuffled)
    return shuffled
