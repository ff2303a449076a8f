import asyncio
from openai import AsyncOpenAI

client = AsyncOpenAI(
    base_url="http://localhost:8011/v1",
    api_key="-"
)

async def stream_response():
    response = await client.chat.completions.create(
        model="meta-llama/Llama-3.1-8B-Instruct",
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Write a short story about AI, in 100 words."}
        ],
        stream=True,
        max_tokens=1024
    )

    # Async iteration over chunks
    async for chunk in response:
        if chunk.choices:
            print(chunk.choices[0].delta.content, end="", flush=True)

    print()

asyncio.run(stream_response())
