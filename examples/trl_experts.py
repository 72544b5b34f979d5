"""Samples responses after [D; q] in TRL 1.16, for trl_icpo.py."""

import torch
from accelerate.utils import gather
from trl.chat_template_utils import parse_response


def sample_experts(trainer, questions: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(IEF) One response to each of n questions, sampled after [D; q].

    questions: rows of the data set, the same n in all processes. Returns the rewards [n], and
    columns of TRL's batch, [n, T] each, padded on the right: completion_ids, completion_mask,
    old_per_token_logps after [D; q], and where TRL has a reference model, ref_per_token_logps of it
    after the plain question.
    """
    # All processes take equally many questions, because sharded weights need equally many passes.
    n, processes = len(questions), trainer.accelerator.num_processes
    share = -(-n // processes)
    mine = (questions * processes)[trainer.accelerator.process_index * share:][:share]
    prompts = [row["prompt"] for row in mine]
    demo_ids, *_ = trainer._tokenize_prompts([trainer.demo_prompt(row) for row in mine])
    tokens, _ = trainer._generate_single_turn(demo_ids, None, {}, 1)
    texts = trainer.processing_class.batch_decode(tokens, skip_special_tokens=True)
    tokenizer = trainer._tokenizer
    if isinstance(prompts[0], list):   # conversations, of the form that TRL gives plain responses
        texts = [[{"role": "assistant", "content": text}] for text in texts]
        if any(getattr(tokenizer, name, None) for name in ("response_template", "response_schema")):
            texts = [[parse_response(tokenizer, ids, prefix=prefix)]
                     for ids, prefix in zip(tokens, demo_ids, strict=True)]
    trainer._calculate_rewards(mine, prompts, texts, tokens)
    # What a reward function logs of these would go to the rows and means of the next plain ones.
    trainer._pending_extra_logs.clear()
    trainer._pending_metrics.clear()
    columns = score_tokens(trainer, trainer.model, demo_ids, tokens, "old_per_token_logps")
    if trainer.beta:
        plain_ids, *_ = trainer._tokenize_prompts(prompts)
        columns |= score_tokens(trainer, trainer.ref_model, plain_ids, tokens,
                                "ref_per_token_logps")
    whole = {name: gather(trainer.accelerator.pad_across_processes(column, dim=1))[:n]
             for name, column in columns.items()}
    return trainer._rewards[:n], whole


@torch.no_grad()
def score_tokens(trainer, model, prompts: list[list[int]], tokens: list[list[int]], name: str):
    """The tokens, their mask and, as `name`, their log-probabilities after the prompts."""
    left, right = (trainer._tokenizer.pad({"input_ids": ids}, padding_side=side,
                                          return_tensors="pt").to(trainer.accelerator.device)
                   for ids, side in ((prompts, "left"), (tokens, "right")))
    T = right["input_ids"].shape[1]
    logps, *_ = trainer._get_per_token_logps_and_entropies(
        model, torch.cat([left["input_ids"], right["input_ids"]], 1),
        torch.cat([left["attention_mask"], right["attention_mask"]], 1), T,
        trainer.args.per_device_train_batch_size)
    return {"completion_ids": right["input_ids"], "completion_mask": right["attention_mask"],
            name: logps}
