"""Training and its tools: transformers' Trainer, PEFT, torchao."""

import numpy as np
import pytest
import torch
from repository.modeling_mambavision import MambaVisionMixer, MambaVisionModelForImageClassification
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
from weights import image


class Stripes(torch.utils.data.Dataset):
    """Two classes that only an order of pixels tells apart: horizontal and vertical stripes under noise."""

    def __len__(self):
        return 96

    def __getitem__(self, index):
        wave = np.sin(np.arange(32) * 0.8 + index)
        grid = np.broadcast_to(wave[:, None] if index % 2 else wave, (3, 32, 32))
        noise = np.random.default_rng(index).normal(0, 0.3, grid.shape)
        return {"pixel_values": torch.tensor(grid + noise, dtype=torch.float32), "labels": index % 2}


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_trains_and_its_checkpoint_reloads(small_config, tmp_path, bf16):
    small_config.num_labels = 2
    torch.manual_seed(0)
    model = MambaVisionModelForImageClassification(small_config)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=4,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=6,
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=bf16,
        seed=0,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Stripes(),
        eval_dataset=Stripes(),
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(np.isfinite(float(loss)) for loss in losses)
    assert trainer.evaluate()["eval_accuracy"] > 0.95

    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    reloaded = AutoModelForImageClassification.from_pretrained(checkpoint, trust_remote_code=True)
    assert all(torch.equal(t, trainer.model.state_dict()[name]) for name, t in reloaded.state_dict().items())


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_lie_as_their_parameters_do(classifier, autocast):
    """DistributedDataParallel warns of others, and copies them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = classifier.train()(image((2, 3, 64, 64))).logits
    logits.float().sum().backward()
    assert {name: p.grad.stride() for name, p in classifier.named_parameters()} == {
        name: p.stride() for name, p in classifier.named_parameters()
    }


def test_lora_on_the_linear_layers_trains(classifier):
    from peft import LoraConfig, get_peft_model

    pixel_values, labels = image((4, 3, 64, 64)), torch.tensor([0, 1, 2, 3])
    with torch.inference_mode():
        expected = classifier(pixel_values).logits
    targets = ["in_proj", "x_proj", "dt_proj", "out_proj", "qkv", "proj", "fc1", "fc2"]
    model = get_peft_model(classifier, LoraConfig(r=4, target_modules=targets, modules_to_save=["head"]))
    assert all(hasattr(block.mixer.dt_proj, "lora_A") for block in mixers(model, "dt_proj"))
    with torch.inference_mode():
        torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in trainable], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()  # of a frozen stem, which recomputed blocks would else get no gradient through
    optimizer.zero_grad()
    model.train()(pixel_values, labels=labels).loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in trainable if "lora_B" in name)
    model.eval()
    adapted = model(pixel_values).logits
    torch.testing.assert_close(model.merge_and_unload()(pixel_values).logits, adapted, rtol=1e-3, atol=1e-4)


def mixers(model, name):
    return [module for module in model.modules() if hasattr(module, "mixer") and hasattr(module.mixer, name)]


def test_torchao_int8_weights_on_the_linear_layers(classifier):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    pixel_values = image((2, 3, 64, 64))
    with torch.inference_mode():
        expected = classifier(pixel_values).logits
        quantize_(classifier, Int8WeightOnlyConfig())
        mixer = next(m for m in classifier.modules() if isinstance(m, MambaVisionMixer))
        assert type(mixer.dt_proj.weight) is not torch.nn.Parameter  # quantised, like every other linear layer
        difference = classifier(pixel_values).logits - expected
    assert difference.abs().max() < 0.05 * expected.std()  # weights rounded to 1/254 of each row's largest
    assert difference.abs().max() > 0


def test_batch_norm_statistics_move_in_training_only(classifier):
    statistics = lambda: {name: b.clone() for name, b in classifier.named_buffers()}  # noqa: E731
    before = statistics()
    classifier(image((2, 3, 64, 64)))
    torch.testing.assert_close(statistics(), before, rtol=0, atol=0)
    classifier.train()
    classifier(image((2, 3, 64, 64)))
    after = statistics()
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_stochastic_depth_drops_whole_residuals_and_keeps_their_mean():
    from repository.modeling_mambavision import DropPath

    torch.manual_seed(0)
    drop = DropPath(0.25)
    kept = drop(torch.ones(4000, 2, 3))
    values = kept.flatten(1)
    assert (values == values[:, :1]).all() and values.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(values.mean() - 1) < 0.05
    assert torch.equal(drop.eval()(torch.ones(2, 2)), torch.ones(2, 2))
