"""Does a base know every character of a dataset? Asked before anything is trained."""

from higgs_tune.data.dataset import Dataset
from higgs_tune.data.tokens import Vocabulary, unknown_in, unknown_problem
from higgs_tune.errors import DataError


def check_texts(dataset: Dataset, vocabulary: Vocabulary) -> None:
    """Refuse a dataset with characters that the vocabulary has no token for.

    Raises:
        DataError: the number of such rows, the first of them, and all their characters.
    """
    if vocabulary.unknown is None:
        return
    rows: list[str] = []
    characters: set[str] = set()
    for row_id, texts in dataset.texts():
        found = {one for text in texts for one in unknown_in(text, vocabulary)}
        if found:
            rows.append(row_id)
            characters |= found
    if rows:
        raise DataError(
            f"{dataset.directory}: in {len(rows)} of {len(dataset.index)} rows (first {rows[0]!r}) "
            + unknown_problem(sorted(characters))
        )
