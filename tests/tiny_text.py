"""Text encoders for the tiny HunyuanVideo pipelines: real tokenizers and models, so that a caption can be given."""

from __future__ import annotations

from typing import Any

import tiny

# Words that captions of tests are made of; the rest of a prompt template may be unknown.
WORDS = ("a", "cat", "two", "dogs", "run", "on", "the", "beach", "blur", "shop", "sign", "says", "open")
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(length: int) -> Any:
    """One token for each word and for each other character, so that the templates are as long as the pipelines cut."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", "</s>", *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), made.pre_tokenizer])
    options = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "model_max_length": length}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=_CHAT, padding_side="right", **options)


def hunyuan_video(pipe: Any) -> Any:
    """Llama and CLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    words = tokenizer(512)
    sizes = {"vocab_size": len(words), "num_attention_heads": 2, "intermediate_size": 32}
    with tiny.seeded(1):
        llama = LlamaModel(LlamaConfig(**sizes, hidden_size=tiny.TEXT_DIM, num_hidden_layers=3)).eval()
        config = CLIPTextConfig(**sizes, hidden_size=tiny.POOLED_DIM, num_hidden_layers=1, eos_token_id=2)
        clip = CLIPTextModel(config).eval()
    pipe.register_modules(text_encoder=llama, tokenizer=words, text_encoder_2=clip, tokenizer_2=tokenizer(77))
    return pipe


def hunyuan_video15(pipe: Any) -> Any:
    """Qwen 2.5 VL's text model and ByT5 for the words in quotes."""
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

    words, letters = tokenizer(2048), ByT5Tokenizer()
    with tiny.seeded(1):
        config = Qwen2_5_VLTextConfig(
            vocab_size=len(words), hidden_size=tiny.TEXT_DIM, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        )  # fmt: skip
        qwen = Qwen2_5_VLTextModel(config).eval()
        sizes = {"d_model": tiny.POOLED_DIM, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        byt5 = T5EncoderModel(T5Config(**sizes, vocab_size=len(letters))).eval()
    pipe.register_modules(text_encoder=qwen, tokenizer=words, text_encoder_2=byt5, tokenizer_2=letters)
    return pipe
