"""Masked language modelling: train a small BERT, and see what it knows of unseen lines."""

from cmkt.linguistic.vocabulary import SPECIAL

MASKED = 0.15  # share of the tokens
EVALUATED = 64  # lines at once
UNSEEN = -100  # label of a position that is not guessed, as transformers has it


def fit(lines: list[list[int]], tokenizer, options, device):
    """Train a model to guess masked tokens.

    Args:
        lines: token ids, special ones included.
        tokenizer: that they are from.
        options: size, training and seed.
        device: a torch device.

    Returns:
        a `BertForMaskedLM` in evaluation mode.
    """
    import torch
    from tqdm import tqdm
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        get_linear_schedule_with_warmup,
    )

    torch.manual_seed(options.seed)
    # A position that no line reaches would stay random; 32 leave room for a prompt.
    positions = tokenizer.model_max_length = max(32, max(map(len, lines)))
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            intermediate_size=4 * options.hidden_size,
            max_position_embeddings=positions,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED, seed=options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    warm_up = options.max_steps // 10
    scheduler = get_linear_schedule_with_warmup(optimizer, warm_up, options.max_steps)
    model.train()
    with tqdm(total=options.max_steps, desc="lm-train", unit="step", mininterval=0.5) as bar:
        while bar.n < options.max_steps:
            for batch in _epoch(lines, options.batch_size)[: options.max_steps - bar.n]:
                examples = [{"input_ids": lines[index]} for index in batch]
                inputs = collate(examples).to(device)
                losses, _ = _losses(model, inputs["input_ids"], inputs["labels"])
                if len(losses):  # a batch of few short lines may have no masked token
                    optimizer.zero_grad()
                    loss = losses.mean()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                scheduler.step()
                bar.update()
    return model.eval()


def _batches(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _epoch(lines: list[list[int]], batch_size: int) -> list[list[int]]:
    """Return the indices of all lines in random batches of similar lengths."""
    import torch

    order = sorted(torch.randperm(len(lines)).tolist(), key=lambda index: len(lines[index]))
    batches = _batches(order, batch_size)
    return [batches[index] for index in torch.randperm(len(batches)).tolist()]


def _losses(model, inputs, labels):
    """Return loss and correctness of each guessed token.

    Args:
        model: a `BertForMaskedLM`.
        inputs: (B, T) token ids.
        labels: (B, T) the right ones where a token is to be guessed, elsewhere `UNSEEN`.

    Returns:
        two tensors (guessed tokens,): cross-entropy in nats, whether the likeliest one is right.
    """
    from torch.nn.functional import cross_entropy

    attended = inputs != model.config.pad_token_id
    states = model.bert(input_ids=inputs, attention_mask=attended).last_hidden_state  # (B, T, D)
    guessed = labels != UNSEEN
    scores = model.cls(states[guessed])  # (guessed tokens, vocabulary)
    right = labels[guessed]
    return cross_entropy(scores, right, reduction="none"), scores.argmax(-1) == right


def evaluate(model, training: list[list[int]], held_out: list[list[int]], device) -> dict:
    """Let the model guess every held-out token once, and a unigram model too.

    Args:
        model: a `BertForMaskedLM`.
        training: token ids of its training lines, special ones included.
        held_out: token ids of lines that it has not seen.
        device: of the model.

    Returns:
        loss (nats) and accuracy of both. Unknown tokens are not asked for.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    losses, right, asked = [], [], []
    stride = round(1 / MASKED)
    for batch in _batches(sorted(held_out, key=len), EVALUATED):
        ids = pad_sequence([torch.tensor(line) for line in batch], batch_first=True).to(device)
        position = torch.arange(ids.shape[1], device=device)
        for offset in range(stride):  # each masks as many tokens as in training
            chosen = (position % stride == offset) & (ids >= len(SPECIAL))
            labels = ids.masked_fill(~chosen, UNSEEN)
            with torch.inference_mode():
                loss, hit = _losses(model, ids.masked_fill(chosen, SPECIAL.index("[MASK]")), labels)
            losses.append(loss), right.append(hit), asked.append(ids[chosen])
    asked = torch.cat(asked).cpu()
    counts = torch.bincount(
        torch.tensor([token for line in training for token in line if token >= len(SPECIAL)]),
        minlength=model.config.vocab_size,
    )
    smoothed = (counts + 1.0) / (counts + 1.0)[len(SPECIAL) :].sum()
    return {
        "held_out_tokens": len(asked),
        "held_out_loss": round(torch.cat(losses).mean().item(), 4),
        "held_out_accuracy": round(torch.cat(right).float().mean().item(), 4),
        "unigram_loss": round(-smoothed[asked].log().mean().item(), 4),
        "unigram_accuracy": round((asked == counts.argmax()).float().mean().item(), 4),
    }
