"""Ask the cluster that `diptych up` brought up, and print the answer as it comes."""

import asyncio

from diptych import Client


async def main() -> None:
    async with Client("127.0.0.1:50051") as client:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        async for chunk in client.generate(messages=messages, max_tokens=64):
            print(chunk.text, end="", flush=True)
    print()


asyncio.run(main())
