"""transformers' Trainer with what a recipe asks for beyond it: parameter groups, averaged weights, frozen parts."""

import contextlib
import json
import math
import re
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from augmentation import EpochOrder
from command import one_line
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments


class RecipeTrainer(Trainer):
    """Trains by a recipe; evaluates and gives (`result`) the averaged weights where there are any.

    Args:
        recipe: see recipe.py.
        variants: further validation sets by name, whose metrics are called `eval_{name}_...`.
        max_minutes: stop with a checkpoint after so long.
        others: what Trainer takes.
    """

    def __init__(self, *args, recipe: dict, variants: dict, max_minutes: float | None = None, **others):
        super().__init__(*args, **others, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))
        self.recipe, self.variants = recipe, variants
        # of the last, smaller batch there is none: its gradient would count as much as a whole one's
        batch = self.args.train_batch_size * self.args.world_size
        count = len(self.train_dataset) // batch * batch
        self.order = EpochOrder(len(self.train_dataset), count, recipe["seed"])
        # each process drops blocks of its own
        torch.manual_seed(recipe["seed"] + self.args.process_index)
        self.ema = None
        if recipe["ema"]:
            from timm.utils import ModelEmaV3

            # buffers too: the averaged weights go with averaged BatchNorm statistics. The decay grows with the steps,
            # so that the first weights, which know nothing, are soon forgotten.
            self.ema = ModelEmaV3(self.model, decay=recipe["ema"], use_warmup=True)
        self.frozen = frozen_modules(self.model)
        self.add_callback(_Steps(self, max_minutes))

    @property
    def result(self) -> nn.Module:
        return self.ema.module if self.ema else self.accelerator.unwrap_model(self.model)

    @property
    def is_complete(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def create_optimizer(self, *args):
        if self.optimizer is None:
            recipe = self.recipe
            groups = parameter_groups(
                self.model, self.args.learning_rate, recipe["weight_decay"], recipe["layer_decay"]
            )
            if recipe["optimizer"] == "muon":
                self.optimizer = muon(groups, self.args)
            else:
                optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = optimizer(groups, **settings)
        return self.optimizer

    def _get_train_sampler(self, *args):
        return self.order

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross entropy with class indices, -100 to leave an image out, or with weights of the classes."""
        if model.training:
            for module in self.frozen:
                module.eval()  # what is not trained keeps its BatchNorm statistics, and drops nothing
        outputs = model(pixel_values=inputs["pixel_values"])
        smoothing = self.recipe["label_smoothing"] if model.training else 0.0
        logits, labels = outputs.logits.float(), inputs["labels"]
        if model.training or (labels != -100).any():
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        else:  # not one of a validation batch could be read
            loss = logits.new_zeros(())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {float(loss)} in step {self.state.global_step + 1}: training stops, for the weights are"
                " lost. Go on from the last checkpoint with --resume and a smaller training.learning_rate or"
                " training.max_grad_norm, or without training.fp16"
            )
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        model, self.model = self.model, self.ema.module if self.ema else self.model
        try:
            with torch.random.fork_rng():  # an evaluation more or less changes nothing of the training
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
                for name, dataset in self.variants.items():
                    metrics |= super().evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
        finally:
            self.model = model
        return metrics

    def save_model(self, output_dir=None, _internal_call=False):
        """The weights in training, from which a training goes on, and the averaged ones beside them."""
        super().save_model(output_dir, _internal_call)
        if self.ema and self.args.should_save:
            state = {name: tensor.contiguous() for name, tensor in self.ema.module.state_dict().items()}
            save_file(state, Path(output_dir or self.args.output_dir) / "ema.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_average(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """With the recipe's settings, which may be others than the checkpoint's."""
        groups = self.optimizer.param_groups
        settings = [{name: x for name, x in group.items() if name not in ("params", "lr")} for group in groups]
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            for group, own in zip(self.optimizer.param_groups, settings, strict=True):
                if group.get("initial_lr") and group["initial_lr"] != own["initial_lr"]:
                    group["lr"] *= own["initial_lr"] / group["initial_lr"]
                group.update(own)
        if hasattr(self.lr_scheduler, "base_lrs"):
            self.lr_scheduler.base_lrs = [own["initial_lr"] for own in settings]
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # for the log

    def _load_rng_state(self, checkpoint):
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str) -> None:
        if self.ema:
            self.ema.module.load_state_dict(load_file(Path(checkpoint) / "ema.safetensors"))


@contextlib.contextmanager
def _reading(checkpoint: str | None):
    """What fails within becomes a ValueError that names the checkpoint."""
    try:
        yield
    except Exception as error:  # the files can be broken, or of another training, in many ways
        raise ValueError(
            f"{checkpoint} does not load into this training ({type(error).__name__}: {one_line(error)}): go on with the"
            " settings that it was made with, or delete it to go on from the checkpoint before"
        ) from error


class _Steps(TrainerCallback):
    """What happens between the steps: the epoch's order, the average of the weights, the end of the time."""

    def __init__(self, trainer: RecipeTrainer, max_minutes: float | None):
        self.trainer = trainer
        self.end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.order.epoch = self.trainer.recipe["start_epoch"] + math.floor(round(state.epoch or 0, 6))

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.ema:
            self.trainer.ema.update(self.trainer.model, state.global_step)
        if self.end < math.inf and state.global_step < state.max_steps:
            late = torch.tensor(float(time.monotonic() > self.end), device=args.device)
            if args.world_size > 1:  # all processes stop at the same step
                torch.distributed.all_reduce(late)
            if late:
                control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.end < math.inf and control.should_training_stop and state.global_step < state.max_steps:
            control.should_evaluate = control.should_save = False  # in the middle of an epoch: that is saved already


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: the Trainer's state is written last, and the rest is there too."""
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    for step in sorted(found, reverse=True):
        needed = ("*model*", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
        try:
            json.loads((found[step] / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if all(list(found[step].glob(name)) for name in needed):
            return found[step]
    return None


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """The optimizer's groups of the parameters that are trained, the head's first.

    Weight decay is for matrices and kernels only: not for norms, biases, gammas and the recurrence's A_log and D.
    The learning rate falls by `layer_decay` from each block to the one before it, the head having all of it.
    """
    depths = {name: _depth(name, model) for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters, top, groups = dict(model.named_parameters()), max(depths.values()), {}
    for name, depth in depths.items():
        decays = parameters[name].ndim > 1 and not name.endswith("A_log")
        group = {
            "params": [],
            "weight_decay": weight_decay if decays else 0.0,
            "lr": learning_rate * layer_decay ** (top - depth),
            "use_fallback": not decays,  # to NAdamW, where the optimizer is Muon
        }
        groups.setdefault((-depth, not decays), group)["params"].append(parameters[name])
    return [groups[key] for key in sorted(groups)]


def muon(groups: list[dict], args: TrainingArguments) -> torch.optim.Optimizer:
    """timm's Muon (https://kellerjordan.github.io/posts/muon) for matrices and kernels, NAdamW for the rest.

    Its steps are scaled to be as long as AdamW's, so learning rates carry over.
    """
    try:
        from timm.optim import muon as timm_muon
    except ImportError as error:
        raise ImportError("optimizer muon needs a newer timm: pip install -U timm") from error

    if args.device.type == "cpu":  # its products are in bfloat16, which takes 20 times as long without instructions
        timm_muon.zeropower_via_newtonschulz = partial(timm_muon.zeropower_via_newtonschulz, dtype=torch.float32)
    return timm_muon.Muon(groups, nesterov=True, betas=(args.adam_beta1, args.adam_beta2))


def _depth(name: str, model: nn.Module) -> int:
    """0 for the stem, 1 for the first block, ..., one more than the last block for the norm and the head."""
    depths = model.config.depths
    if "patch_embed." in name:
        return 0
    if block := re.search(r"levels\.(\d)\.blocks\.(\d+)\.", name):
        return 1 + sum(depths[: int(block[1])]) + int(block[2])
    if downsample := re.search(r"levels\.(\d)\.downsample\.", name):
        return sum(depths[: int(downsample[1]) + 1])
    return 1 + sum(depths)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that have parameters, but none that is trained."""
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [model]
    return [frozen for child in model.children() for frozen in frozen_modules(child)] if parameters else []


def add_lora(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    """The model with peft's low-rank additions to the linear layers of its token blocks; they and the head train."""
    from peft import LoraConfig, get_peft_model

    layers = ["in_proj", "x_proj", "dt_proj", "out_proj", "qkv", "proj", "fc1", "fc2"]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, modules_to_save=["head"]))


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of all processes, in plain torch: torch's own SyncBatchNorm runs on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce  # passes gradients between the processes

        # fp32, and two passes: the mean of squares less the square of the mean loses its digits
        axes, shape, y = (0, 2, 3), (1, -1, 1, 1), x.float()
        count = y.numel() // y.shape[1] * torch.distributed.get_world_size()
        mean = all_reduce(y.sum(axes)) / count
        variance = all_reduce((y - mean.view(shape)).square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return ((y - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def synchronise_batch_norm(model: nn.Module, device_type: str) -> nn.Module:
    """Without this each process normalises by the statistics of its own images, as with a batch of that size."""
    if device_type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d  # the same parameters, statistics and names
    return model
