"""The fields of transformers.TrainingArguments that say how a model learns, and what must come of their values."""

import math

from flag_cases import EVALUATED, Refused, Runs, Table, other, reaches, refused, same
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from flashmhf.training.defaults import DEFAULTS
from flashmhf.training.precision import computes_bfloat16

COSINE = "--lr-scheduler-type cosine_with_min_lr"
SCHEDULES = {
    "reduce_lr_on_plateau": EVALUATED,
    "greedy": EVALUATED,
    "warmup_stable_decay": "--lr-scheduler-kwargs '{\"num_decay_steps\": 1}'",
}
MADE_BY_TORCH = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}


def schedules() -> list[Runs | Refused]:
    runs = []
    for kind in (each.value for each in SchedulerType):
        flags = f"--lr-scheduler-type {kind} {SCHEDULES.get(kind, '')}"
        runs.append(same(flags) if kind == DEFAULTS["lr_scheduler_type"] else other(flags))
    missing = Refused("--lr-scheduler-type warmup_stable_decay", "num_decay_steps")
    return [
        *runs,
        missing,
        Refused("--lr-scheduler-type greedy", "eval strategy"),
        Refused("--lr-scheduler-type no", "no"),
    ]


def optimizers() -> list[Runs | Refused]:
    def case(name: str) -> Runs | Refused:
        if name in MADE_BY_TORCH:
            default = name == "adamw_torch_fused"
            return Runs(f"--optim {name}", lambda run: run.same_weights() == default)
        return Refused(f"--optim {name}", "optim: ")  # the library is not installed, or steps in the backward

    return [*(case(each.value) for each in OptimizerNames), Refused("--optim muno", "muno")]


LEARNING: Table = {
    "output_dir": [Runs("", lambda run: (run.folder / "model.safetensors").is_file())],
    "per_device_train_batch_size": [
        Runs("--per-device-train-batch-size 2", lambda run: run.result.tokens == 3 * 2 * 32),
        *refused("--per-device-train-batch-size", "expected 1 or more", "0", "-4"),
    ],
    "num_train_epochs": [
        Runs(
            "--max-steps -1 --num-train-epochs 0.01",
            lambda run: run.result.steps == math.ceil(0.01 * len(run.trainer.get_train_dataloader())),
        ),
        *refused("--max-steps -1 --num-train-epochs", "num-train-epochs: expected", "0", "-1", "nan"),
    ],
    "max_steps": [
        Runs("--max-steps 2 --num-train-epochs 9", lambda run: run.result.steps == 2),
        *refused("--max-steps", "max-steps: expected 1 or more", "0", "-5"),
    ],
    "learning_rate": [
        other("--learning-rate 1e-3"),
        *refused("--learning-rate", "learning-rate: ", "-1", "nan", "inf"),
    ],
    "lr_scheduler_type": schedules(),
    "lr_scheduler_kwargs": [
        other(f"{COSINE} --lr-scheduler-kwargs '{{\"min_lr_rate\": 0.9}}'"),
        Refused(f"{COSINE} --lr-scheduler-kwargs '{{\"min_lr_rat\": 0.9}}'", "min_lr_rat"),
        Refused(f'{COSINE} --lr-scheduler-kwargs \'{{"min_lr_rate": "x"}}\'', "lr-scheduler-kwargs"),
        Refused("--lr-scheduler-kwargs x", "lr-scheduler-kwargs"),
        Refused("--lr-scheduler-kwargs '{'", "Expecting"),
        Refused("--lr-scheduler-type constant --lr-scheduler-kwargs '{\"x\": 1}'", "none with a constant schedule"),
    ],
    "warmup_steps": [
        other("--warmup-steps 2"),
        *refused("--warmup-steps", "warmup-steps: expected", "-1", "1.5"),
        Refused("--warmup-steps 3", "warmup-steps: expected fewer than the 3 steps of the run, got 3"),
        Refused("--warmup-steps 0.9", "warmup-steps: expected fewer than the 3 steps of the run, got 3 (0.9 of them)"),
        Runs("--warmup-steps 0.5", lambda run: run.trainer.args.get_warmup_steps(3) == 2),
        Refused("--lr-scheduler-type constant --warmup-steps 5", "warmup-steps: expected none"),
    ],
    "optim": optimizers(),
    "optim_args": [
        Runs(
            "--optim sgd --optim-args momentum=0.5",
            lambda run: run.trainer.optimizer.param_groups[0]["momentum"] == 0.5,
        ),
        Refused("--optim sgd --optim-args mometum=0.5", "expected options that sgd reads, got mometum"),
        Refused("--optim-args amsgrad=True", "expected options that adamw_torch_fused reads, got amsgrad"),
        Refused("--optim-args banana", "optim-args: expected name=value"),
        Refused("--optim sgd --optim-args momentum=x", "optim: sgd: "),
    ],
    "weight_decay": [other("--weight-decay 0.5"), *refused("--weight-decay", "expected 0 or more", "-1")],
    "adam_beta1": [other("--adam-beta1 0.5"), *refused("--adam-beta1", "adam-beta1: expected 0 or more", "1", "-0.1")],
    "adam_beta2": [other("--adam-beta2 0.5"), *refused("--adam-beta2", "adam-beta2: expected 0 or more", "1", "-0.1")],
    "adam_epsilon": [other("--adam-epsilon 1e-3"), *refused("--adam-epsilon", "expected 0 or more", "-1")],
    "optim_target_modules": [Refused("--optim-target-modules all-linear", "none without --optim galore")],
    "gradient_accumulation_steps": [
        Runs("--gradient-accumulation-steps 2", lambda run: run.result.tokens == 2 * run.base.result.tokens),
        *refused("--gradient-accumulation-steps", "expected 1 or more", "0", "-1"),
    ],
    "average_tokens_across_devices": [same("--average-tokens-across-devices false")],
    "max_grad_norm": [
        other("--max-grad-norm 0.01"),
        *refused("--max-grad-norm", "max-grad-norm: ", "-1", "nan", "inf"),
    ],
    "label_smoothing_factor": [
        other("--label-smoothing-factor 0.1"),
        *refused("--label-smoothing-factor", "expected 0 or more and less than 1", "1", "-0.1"),
    ],
    "bf16": [other(f"--bf16 {str(not computes_bfloat16(use_cpu=True)).lower()}")],
    "fp16": [Refused("--fp16 true", "fp16: expected false on the CPU")],
    "bf16_full_eval": [
        Runs(
            "--bf16-full-eval true",
            lambda run: run.same_weights() and run.result.validation_loss != run.base.result.validation_loss,
        )
    ],
    "fp16_full_eval": [
        Runs(
            "--fp16-full-eval true",
            lambda run: run.same_weights() and run.result.validation_loss != run.base.result.validation_loss,
        )
    ],
    "tf32": [same("--tf32 false"), Refused("--tf32 true", "tf32 requires")],
    "activation_checkpointing": [
        reaches("--activation-checkpointing true", lambda trainer: trainer.model.is_gradient_checkpointing)
    ],
    "activation_checkpointing_kwargs": [
        reaches(
            "--activation-checkpointing true --activation-checkpointing-kwargs '{\"every_n_layers\": 1}'",
            lambda trainer: trainer.model.is_gradient_checkpointing,
        ),
        Refused(
            "--activation-checkpointing true --activation-checkpointing-kwargs '{\"every_n_layers\": 0}'",
            "every_n_layers: expected 1 or more",
        ),
        Refused("--activation-checkpointing-kwargs '{\"every_n_layers\": 1}'", "none without"),
    ],
    "gradient_checkpointing": [
        reaches("--gradient-checkpointing true", lambda trainer: trainer.model.is_gradient_checkpointing)
    ],
    "gradient_checkpointing_kwargs": [
        same("--gradient-checkpointing true --gradient-checkpointing-kwargs '{\"use_reentrant\": true}'"),
        Refused("--gradient-checkpointing true --gradient-checkpointing-kwargs '{\"x\": 1}'", "x"),
        Refused("--gradient-checkpointing-kwargs '{\"use_reentrant\": true}'", "none without"),
    ],
    "torch_compile": [Refused("--torch-compile true --torch-compile-backend x", "torch-compile: ")],
    "torch_compile_backend": [
        Runs(
            "--torch-compile-backend eager",
            lambda run: (
                run.trainer.args.torch_compile
                and abs(run.result.validation_loss - run.base.result.validation_loss) < 1e-4
            ),
        )
    ],
    "torch_compile_mode": [Refused("--torch-compile-mode x", "torch-compile: ")],
    "use_liger_kernel": [Refused("--use-liger-kernel true", "use-liger-kernel: expected false")],
    "liger_kernel_config": [Refused("--liger-kernel-config '{\"rope\": true}'", "liger")],
    "use_cache": [reaches("--use-cache true", lambda trainer: trainer.model.config.use_cache)],
    "neftune_noise_alpha": [other("--neftune-noise-alpha 5"), *refused("--neftune-noise-alpha", "expected 0 or", "-5")],
}
