// The official Node SDK: a chat, a stream, a loop of tools, structured output, responses, embeddings, a batch.
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI(); // OPENAI_BASE_URL
const model = "auto";
const messages = [{ role: "user", content: "What is the weather in Rome?" }];

const answer = await client.chat.completions.create({ model, messages, max_tokens: 16, n: 2, temperature: 1 });
assert.equal(answer.choices.length, 2);
assert.ok(answer.choices[0].message.content);
assert.ok(answer.usage.completion_tokens <= 32);

const stream = client.chat.completions.stream({ model, messages, max_tokens: 16 });
let text = "";
stream.on("content", (piece) => (text += piece));
assert.equal(await stream.finalContent(), text);
assert.ok(text);

const called = [];
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather of a place.",
    parse: JSON.parse,
    function: ({ place }) => {
      called.push(place);
      return `It is sunny in ${place}.`;
    },
    parameters: { type: "object", properties: { place: { type: "string", maxLength: 20 } }, required: ["place"] },
  },
};
const runner = client.chat.completions.runTools(
  { model, messages, tools: [weather], tool_choice: "required", parallel_tool_calls: false, stream: true },
  { maxChatCompletions: 1 },
);
await runner.done();
assert.equal(called.length, 1);
assert.deepEqual(runner.messages.map((turn) => turn.role).slice(0, 3), ["user", "assistant", "tool"]);
const told = await client.chat.completions.create({ model, messages: runner.messages, max_tokens: 24 });
assert.ok(told.choices[0].message.content);

const Person = z.object({ name: z.string(), age: z.number().int() });
const parsed = await client.chat.completions.parse({
  model,
  messages: [{ role: "user", content: "Ann is 41 years old." }],
  response_format: zodResponseFormat(Person, "person"),
});
Person.parse(parsed.choices[0].message.parsed);

const first = await client.responses.create({ model, input: "Name a river.", max_output_tokens: 16 });
assert.ok(first.output_text);
const second = client.responses.stream({
  model,
  input: "And a sea?",
  previous_response_id: first.id,
  max_output_tokens: 16,
});
let said = "";
for await (const event of second) if (event.type === "response.output_text.delta") said += event.delta;
assert.equal((await client.responses.retrieve((await second.finalResponse()).id)).output_text, said);

const vectors = await client.embeddings.create({ model, input: ["the sky", "the sea"], dimensions: 8 });
assert.deepEqual(vectors.data.map((one) => one.embedding.length), [8, 8]);

const lines = [0, 1].map((n) =>
  JSON.stringify({
    custom_id: String(n),
    method: "POST",
    url: "/v1/completions",
    body: { model, prompt: `Say ${n}.`, max_tokens: 4 },
  }),
);
const file = await client.files.create({ file: await toFile(Buffer.from(lines.join("\n")), "b.jsonl"), purpose: "batch" });
let batch = await client.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/completions",
  completion_window: "24h",
});
while (["validating", "in_progress", "finalizing"].includes(batch.status)) {
  await new Promise((done) => setTimeout(done, 200));
  batch = await client.batches.retrieve(batch.id);
}
assert.equal(batch.status, "completed");
const output = await (await client.files.content(batch.output_file_id)).text();
assert.equal(output.trim().split("\n").length, 2);

await assert.rejects(client.chat.completions.create({ model: "gpt-4o", messages }), OpenAI.NotFoundError);
