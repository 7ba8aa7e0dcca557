"""Make the embedded base's tokenizer: `python -m higgs_tune.embedded.make.tokenizer`.

One token per character, so that a base of a few million parameters can spell any of the languages.
The control tokens and the pieces of a turn's header have the names that Higgs Audio V2 gives them.
"""

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

UNKNOWN, PAD = "<|unk|>", "<|pad|>"
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
CONTROL_TOKENS = (
    BEGIN,
    END,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|audio_out_bos|>",
    "<|audio_eos|>",
    "<|AUDIO_OUT|>",
    "<|reserved_special_token_6|>",  # placeholder of a row of the audio delay
    PAD,
    UNKNOWN,
)
HEADER_PIECES = ("system", "user", "assistant", "\n\n")
# Inclusive ranges of code points.
_RANGES = (
    (0x20, 0x7E),  # ASCII
    (0xA0, 0xFF),  # Latin-1 letters and signs
    (0x100, 0x17F),  # Latin Extended-A: Turkish, Polish, Czech, …
    (0x218, 0x21B),  # Romanian
    (0x400, 0x45F),  # Cyrillic
    (0x490, 0x491),  # Ukrainian
    (0x621, 0x652),  # Arabic letters, tatweel, vowel signs (unassigned ones are left out)
    (0x653, 0x655),
    (0x660, 0x669),  # Arabic-Indic digits
    (0x670, 0x671),
)
_SINGLES = "\n\t،؛؟٪پچژڤکگی–—‘’‚“”„…€№"


def characters() -> list[str]:
    """Every character with a token of its own, in the order of their ids."""
    unassigned = set(range(0x63B, 0x640))  # letters for other languages than Arabic
    ranges = [chr(c) for low, high in _RANGES for c in range(low, high + 1) if c not in unassigned]
    return list(dict.fromkeys([*ranges, *_SINGLES]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: NFC, then one token per character.

    "\\n\\n" and a segment that is just a role are one token each.
    """
    tokens = [*CONTROL_TOKENS, *HEADER_PIECES, *characters()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.NFC()
    # Control tokens cut the text first, so the role in a header is a whole segment.
    pieces = Regex(r"\A(?:system|user|assistant)\z|\n\n|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token="<|eot_id|>",
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[t for t in CONTROL_TOKENS if t not in (BEGIN, PAD, UNKNOWN)],
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parents[1] / "base"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
