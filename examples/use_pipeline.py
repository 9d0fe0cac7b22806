"""The pipeline of transformers; zoom options go to `generate_kwargs`.

python examples/use_pipeline.py [--image FILE --question TEXT]
"""

from common import FINE, PAGE, arguments
from transformers import pipeline


options = arguments(__doc__, image={"default": PAGE}, question={"default": FINE})
pipe = pipeline("image-text-to-text", model=options.model, trust_remote_code=True, device_map="auto")

content = [{"type": "image", "image": str(options.image)}, {"type": "text", "text": options.question}]
chat = [{"role": "user", "content": content}]
for zoom in ("never", "auto", "always"):
    result = pipe(chat, generate_kwargs={"zoom": zoom, "max_new_tokens": 16}, return_full_text=False)
    print(f"zoom={zoom:7} {result[0]['generated_text']}")

# several chats at once
results = pipe([chat, chat], batch_size=2, generate_kwargs={"max_new_tokens": 16}, return_full_text=False)
print([result[0]["generated_text"] for result in results])
