"""A model overfitted on four clips with our labels stops where they stop, in stock generation."""

import numpy as np
import torch

from higgs_tune.data.collate import collate, count_targets
from higgs_tune.data.tokens import encode_conversation, undelay_codes
from higgs_tune.model.packed_forward import packed_nll
from tests.models import NUM_CODES, conversation, tiny_base, vocabulary

EOS = NUM_CODES + 1


def test_a_model_overfitted_on_four_clips_stops_where_they_stop():
    model = tiny_base(seed=3).model.requires_grad_(True)
    talks = [conversation("speak", seed, num_frames=4 + 3 * seed) for seed in range(4)]
    examples = [encode_conversation(talk, vocabulary()) for talk in talks]
    batch, count_C = collate({0: examples}), torch.from_numpy(count_targets(examples, 4).audio_C)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss = torch.tensor(torch.inf)
    for _ in range(400):
        loss = (packed_nll(model, batch, None)[1][0] / count_C).mean()
        if float(loss.detach()) < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.01

    model.requires_grad_(False).eval()
    for talk, example in zip(talks, examples, strict=True):
        prompt = torch.from_numpy(example.ids_L[: example.audio_rows_A[0]])[None]
        frames = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=60,
            do_sample=False,
        )[0].numpy()
        target = talk.turns[-1].parts[0].codes_TC
        np.testing.assert_array_equal(undelay_codes(frames, EOS), target)
