"""What a run writes for TensorBoard."""

import threading
import time

import pytest

from higgs_tune.metrics import STEP
from higgs_tune.train.board import Board
from higgs_tune.train.samples import Sample
from tests import boards
from tests.full_disk import largest_file


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_write_raises_an_error_instead_of_blocking(tmp_path):
    board, errors = Board(tmp_path, next_step=0), []
    figures = {f"figure {number}": 1.0 for number in range(30)}

    def write():
        try:
            for step in range(10_000):
                board.add({STEP: step} | figures)
                time.sleep(0.01)
        except OSError as error:
            errors.append(str(error))

    thread = threading.Thread(target=write, daemon=True)
    with largest_file(100):
        thread.start()
        thread.join(30)
    assert not thread.is_alive()
    assert errors == ["TensorBoard's events could not be written, see above"]
    board.close()


def test_a_sample_is_one_row_of_its_table_whatever_its_texts_hold(tmp_path):
    board = Board(tmp_path, next_step=0)
    board.add_samples(3, [Sample("r0", "yes | no", "yes|\nno", ended=True)])
    board.close()
    (table,) = boards.texts(tmp_path).values()
    assert table.splitlines()[2:] == [r"| yes \| no | yes\| no |"]
