import asyncio
from llmboost import LLMBoost

async def stream_with_llmboost():
    # Enable async output and streaming
    llm = LLMBoost(
        model_name="meta-llama/Llama-3.1-8B-Instruct",
        streaming=True,
        enable_async_output=True, # Enable async mode
        tp=1,
        dp=1,
        max_tokens=1024
    )

    llm.start()

    # Submit prompt
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Write a short story about AI, in 100 words."}
    ]
    prompt = llm.apply_format(messages)
    llm.issues_inputs(prompt)

    # Async streaming
    while True:
        output = await llm.aget_output()
        print(output['val'], end="", flush=True)
        if output['finished']:
            break

    print()
    llm.stop()

if __name__ == "__main__":
    asyncio.run(stream_with_llmboost())
