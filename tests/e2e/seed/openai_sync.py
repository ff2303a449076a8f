from openai import OpenAI

client = OpenAI(
    base_url="http://localhost:8011/v1",
    api_key="-"
)

# Enable streaming with stream=True
response = client.chat.completions.create(
    model="meta-llama/Llama-3.1-8B-Instruct",
    messages=[
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Write a short story about AI, in 100 words."}
    ],
    stream=True, # Enable streaming
    max_tokens=1024
)

# Process tokens as they arrive
for chunk in response:
    if chunk.choices:
        print(chunk.choices[0].delta.content, end="", flush=True)

print() # New line at end
