"""Fine-tuning with the SFTTrainer of TRL, every sequence sharded over ranks: a tiny random model on made-up text.

    torchrun --nproc-per-node 4 examples/sft.py --sequence-ranks 2 --cpu
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 \
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP examples/sft.py --sequence-ranks 4

Two lines differ from a script for one GPU per sequence: the class, and `sequence_ranks`. It needs `pip install trl`.
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ulysses_triton.integrations.trainer import SequenceParallelMixin

WORDS = ["<pad>", "<eos>", *"the a cat dog bird sees hears likes and but big small".split()]


class ShardedSFTTrainer(SequenceParallelMixin, SFTTrainer):
    pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequence-ranks", type=int, default=2, help="how many ranks share every sequence")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", default="runs/sft")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    stories = [
        " ".join(WORDS[2 + (start + i * step) % 12] for i in range(20)) for start in range(40) for step in (1, 5)
    ]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip
    trainer = ShardedSFTTrainer(
        model,
        SFTConfig(
            output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=1, learning_rate=1e-2,
            packing=True, max_length=256, logging_steps=10, save_strategy="no", report_to="none", bf16=not options.cpu,
            use_cpu=options.cpu,
        ),
        train_dataset=Dataset.from_dict({"text": stories}),
        processing_class=tokenizer,
        sequence_ranks=options.sequence_ranks,
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main()
