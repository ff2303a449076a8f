from llmboost import LLMBoost

if __name__ == "__main__":
    # Enable streaming in initialization
    llm = LLMBoost(
        model_name="meta-llama/Llama-3.1-8B-Instruct",
        streaming=True, # Enable streaming
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

    # Stream tokens as they're generated
    resp_finish = False
    while not resp_finish:
        outputs = llm.get_output()
        for output in outputs:
            print(output['val'], end="", flush=True)
            if output['finished']:
                resp_finish = True
                break

    print() # New line

    llm.stop()
