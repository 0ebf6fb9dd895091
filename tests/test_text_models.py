"""Text towers: unit rows, padding without meaning, keyed dropout, weights taken over, errors."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import ConfigError, ModelConfig, parse_config
from trainer.dropout import (
    UNDROPPED,
    KeyedDropout,
    KeyedTokenDropout,
    make_dropout_keyed,
    row_keys,
    use_row_keys,
)
from trainer.models import build_text_model
from trainer.models.layers import parameter_layers
from trainer.models.texts.build import restore_text_model
from trainer.optim import decayed_names, parameter_groups

BUCKETS, LENGTH = 60, 9
BAG = {"name": "bag", "token_weights": True}
TRANSFORMER = {"name": "transformer", "heads": 2}
OPEN_CLIP_MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 99, "width": 16, "heads": 2, "layers": 2},
}
KINDS = [BAG, {"name": "bag", "layers": 0}, TRANSFORMER, {"name": "open_clip"}]


def text_model(tmp_path, loss_name="decoupled", **options):
    if options["name"] == "open_clip":
        path = tmp_path / "clip.json"
        path.write_text(json.dumps(OPEN_CLIP_MODEL))
        options["name"] = f"open_clip:{path}"
    shape = {"width": 16, "embedding_dim": 8, "buckets": BUCKETS, "context_length": LENGTH}
    model = build_text_model(ModelConfig(**{**shape, **options}), loss_name=loss_name)
    make_dropout_keyed(model)
    return model


def some_tokens(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, BUCKETS, (len(lengths), LENGTH), generator=generator)
    return rows * (torch.arange(LENGTH) < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_rows_are_unit_and_know_nothing_of_their_neighbours(tmp_path, options):
    model = text_model(tmp_path, **options).eval()
    tokens = some_tokens([1, 4, 9, 2, 7])
    rows, labels, scale, bias = model(tokens, tokens[:2])
    assert rows.dtype == torch.float32 and rows.shape == (5, model.embed_dim)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(labels, rows[:2])
    torch.testing.assert_close(scale, torch.tensor([20.0])) if bias is None else None
    for i in range(5):
        torch.testing.assert_close(model(tokens[i : i + 1]).queries, rows[i : i + 1])
    torch.testing.assert_close(model(None, tokens).labels, rows)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_no_rows_are_rows_too_with_zero_gradients(tmp_path, options):
    """A chunk of labels beyond a rank's last query: every parameter still has a gradient."""
    model = text_model(tmp_path, **options, shared_towers=False)
    use_row_keys(model, row_keys(0, torch.arange(0)))
    keys = row_keys(0, torch.arange(3))
    rows, labels, _, _ = model(some_tokens([])[:0], some_tokens([3, 1, 5]), keys)
    assert rows.shape == (0, model.embed_dim) and len(labels) == 3
    (rows.sum() + labels[:, 0].sum()).backward()
    for name, parameter in model.towers.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("queries"):
            assert not parameter.grad.any()


@pytest.mark.parametrize("options", KINDS[:3], ids=str)
def test_a_text_without_words_is_a_finite_row(tmp_path, options):
    model = text_model(tmp_path, **options)
    rows = model(some_tokens([0, 3])).queries
    rows[:, 0].sum().backward()
    assert rows.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_bag_is_its_mean(tmp_path):
    model = text_model(tmp_path, name="bag", layers=0).eval().double()
    tokens = some_tokens([3, 9])
    tower = model.towers["texts"]
    table, matrix = tower.tokens.weight, tower.proj.weight
    for row, count in zip(tokens, (3, 9), strict=True):
        expected = matrix @ table[row[:count]].mean(0)
        torch.testing.assert_close(
            model(row[None]).queries[0], expected / expected.norm(), rtol=1e-12, atol=1e-12
        )


@given(weights=st.lists(st.floats(0.1, 4), min_size=4, max_size=4))
def test_a_weighted_bag_is_the_weighted_mean(tmp_path_factory, weights):
    model = text_model(None, name="bag", layers=0, token_weights=True).eval().double()
    tower = model.towers["texts"]
    plain = text_model(None, name="bag", layers=0).eval().double()
    plain.towers["texts"].load_state_dict(tower.state_dict(), strict=False)
    tokens = torch.tensor([[5, 6, 7, 8] + [0] * (LENGTH - 4)])
    torch.testing.assert_close(model(tokens).queries, plain(tokens).queries)
    values = torch.tensor(weights, dtype=torch.float64)
    with torch.no_grad():
        tower.weights.weight[5:9, 0] = values.expm1().log()  # softplus of it is the value
    expected = tower.proj.weight @ (values / values.sum() @ tower.tokens.weight[5:9])
    torch.testing.assert_close(model(tokens).queries[0], expected / expected.norm())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"name": "bag", "token_dropout": 0.5, "dropout": 0.2},
        {**TRANSFORMER, "dropout": 0.3, "drop_path": 0.2},
        {**TRANSFORMER, "dropout": 0.3, "grad_checkpointing": True},
    ],
    ids=str,
)
def test_masks_follow_keys_of_texts_and_labels(tmp_path, options, shared):
    model = text_model(tmp_path, **options, shared_towers=shared)
    queries, labels = some_tokens([9, 8, 7, 9]), some_tokens([9, 9, 6], seed=1)
    keys, label_keys = row_keys(0, torch.arange(4)), row_keys(0, torch.arange(50, 53))
    use_row_keys(model, keys)
    whole = model(queries, labels, label_keys)
    again, order = [2, 0], [2, 1]
    use_row_keys(model, keys[again])
    some = model(queries[again], labels[order], label_keys[order])
    torch.testing.assert_close(some.queries, whole.queries[again])
    torch.testing.assert_close(some.labels, whole.labels[order])
    use_row_keys(model, keys + 1)
    assert (model(queries, labels, label_keys).queries - whole.queries).abs().max() > 1e-3
    assert (model(queries, labels, label_keys + 1).labels - whole.labels).abs().max() > 1e-3
    (whole.queries[:, 0].sum() + whole.labels[:, 1].sum()).backward()
    assert all(p.grad is not None for p in model.towers.parameters())


def test_token_dropout_never_takes_the_last_token(tmp_path):
    model = text_model(tmp_path, name="bag", token_dropout=0.9)
    dropout = model.towers["texts"].token_dropout
    dropout.keys = row_keys(0, torch.arange(500))
    present = torch.arange(LENGTH).expand(500, LENGTH) < 3
    kept = dropout(present)
    assert kept.any(1).all() and not (kept & ~present).any()
    assert 1.0 < kept.sum(1).float().mean() < 3.0


def test_two_towers_or_one(tmp_path):
    two = text_model(tmp_path, name="bag", shared_towers=False).eval()
    assert set(two.towers) == {"queries", "labels"}
    tokens = some_tokens([4, 4])
    assert (two(tokens).queries - two(None, tokens).labels).abs().max() > 0.01
    one = build_text_model(
        ModelConfig(name="bag", buckets=BUCKETS, shared_towers=False),
        loss_name="one_vs_all",
        embeds_labels=False,
    )
    assert set(one.towers) == {"texts"} and one.bias is not None and one.log_scale.exp() == 10


def test_groups_of_parameters_and_frozen_towers(tmp_path):
    model = text_model(tmp_path, name="transformer", heads=2, layers=3)
    decayed = decayed_names(model, "open_clip")
    assert "towers.texts.tokens.weight" in decayed and "log_scale" not in decayed
    assert "towers.texts.ln_final.weight" not in decayed
    config = parse_config({"optim": {"layer_decay": 0.5, "text_lr": 1e-3, "lr": 1e-3}}, "x").optim
    scales = {
        name: group["lr_scale"]
        for group in parameter_groups(model, config)
        for name in group["names"]
    }
    assert scales["log_scale"] == 1 and scales["towers.texts.proj.weight"] == 1
    assert scales["towers.texts.blocks.2.mlp.fc1.weight"] == 0.5
    assert scales["towers.texts.tokens.weight"] == 0.5**4
    locked = text_model(
        tmp_path, name="transformer", heads=2, lock_text=True, lock_text_unlocked_layers=1
    )
    trained = {name for name, p in locked.named_parameters() if p.requires_grad}
    assert trained == {"log_scale", "towers.texts.proj.weight"}
    assert {layer.tower for layer in parameter_layers(locked).values()} == {"text"}


def test_weights_go_from_one_model_to_another(tmp_path):
    from safetensors.torch import save_file

    first = text_model(tmp_path, name="bag", shared_towers=False).eval()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)
    path = tmp_path / "x.safetensors"
    save_file(first.state_dict(), path)
    tokens = some_tokens([5, 2])
    for shared in (True, False):
        model = text_model(tmp_path, name="bag", shared_towers=shared, pretrained=str(path)).eval()
        torch.testing.assert_close(model(tokens).queries, first(tokens).queries)
    torch.testing.assert_close(model(None, tokens).labels, first(None, tokens).labels)
    with pytest.raises(ConfigError, match=r"proj.weight is \(8, 16\).*makes it \(4, 16\)"):
        text_model(tmp_path, name="bag", embedding_dim=4, pretrained=str(path))
    config = parse_config(
        {"loss": {"name": "decoupled"}, "model": {"name": "bag", "width": 8}}, "x"
    )
    with pytest.raises(ConfigError, match=r"set \[model\] as it was|lack"):
        restore_text_model(first.state_dict(), config)


def test_the_text_side_of_an_open_clip_checkpoint(tmp_path):
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.CLIP(**OPEN_CLIP_MODEL).eval()
    path = tmp_path / "clip.pt"
    torch.save(clip.state_dict(), path)
    model = text_model(tmp_path, name="open_clip", pretrained=str(path)).eval()
    assert model.embed_dim == 8 and model.tokenizer_spec.context_length == LENGTH
    tokens = some_tokens([3, 9])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).queries, clip.encode_text(tokens, normalize=True))
    assert not any("visual" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "bagg"}, "nearest: bag"),
        ({"name": "ViT-B-32"}, "is no text tower"),
        ({"name": "transformer", "heads": 3}, "no multiple of model.heads = 3"),
        ({"name": "bag", "skip": 1}, "set model.ngrams = 2"),
        ({"name": "bag", "grad_checkpointing": True}, "nothing to recompute"),
        ({"name": "bag", "lock_image": True}, "lock_image is for image towers"),
        ({"name": "transformer", "heads": 2, "token_dropout": 0.5}, "token_dropout is the bag's"),
        ({"name": "hf:/nowhere"}, "no folder with a config.json"),
        ({"name": "open_clip:ViT-Q"}, "nearest"),
        ({"name": "bag", "pretrained": "/nowhere"}, "no such folder"),
    ],
)
def test_what_cannot_be_built_says_why(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        text_model(tmp_path, **options)


def test_a_hugging_face_folder_is_used_as_it_lies(tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    try:
        import transformers
    except ImportError:
        with pytest.raises(ConfigError, match=r"pip install 'nsphere\[hf\]'"):
            text_model(tmp_path, name=f"hf:{folder}")
        pytest.skip("transformers is not here")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, pad_token_id=0,
    )  # fmt: skip
    source = transformers.BertModel(config, add_pooling_layer=False).eval()
    source.save_pretrained(folder)
    model = text_model(tmp_path, name=f"hf:{folder}").eval()
    tokens = some_tokens([3, 9])
    with torch.no_grad():
        hidden = source(tokens[:1, :3]).last_hidden_state.mean(1)
        expected = torch.nn.functional.normalize(hidden, dim=1)
        torch.testing.assert_close(model(tokens).queries[:1], expected, rtol=1e-4, atol=1e-5)
    use_row_keys(model.train(), row_keys(0, torch.arange(2)))
    model(tokens).queries[:, 0].sum().backward()
    assert all(p.grad is not None for p in model.towers.parameters())


def test_rows_of_labels_may_keep_everything():
    """A row with the key that drops nothing is as in evaluation, its neighbours are not."""
    keys = torch.tensor([5, UNDROPPED, 9])
    x, tokens = torch.ones(3, 400), torch.ones(3, 50, dtype=torch.bool)
    dropout, token_dropout = KeyedDropout(0.5, 1), KeyedTokenDropout(0.5)
    for layer in (dropout, token_dropout):
        use_row_keys(layer, keys)
    dropped, kept = dropout(x), token_dropout(tokens)
    assert (dropped[1] == 1).all() and kept[1].all()
    for row in (0, 2):
        assert set(dropped[row].tolist()) == {0.0, 2.0} and 10 < int(kept[row].sum()) < 40
    assert dropout(x.bfloat16()).dtype == torch.bfloat16
