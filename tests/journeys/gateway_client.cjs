// The openai client for JavaScript against a gateway: chat, streams, tools, responses. Prints one JSON object.
// Usage: node gateway_client.cjs BASE_URL API_KEY, with the package `openai` on NODE_PATH.
const { OpenAI } = require("openai");

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "2+2?" }];
const parameters = { type: "object", properties: { expression: { type: "string" } } };
const tools = [{ type: "function", function: { name: "calculate", parameters } }];

async function main() {
  const said = {};
  const chat = await client.chat.completions.create({ model: "policy", messages, max_tokens: 8 });
  said.chat = chat.usage.completion_tokens;
  const stream = await client.chat.completions.create({ model: "policy", messages, max_tokens: 8, stream: true });
  said.finish = [];
  for await (const chunk of stream) if (chunk.choices[0].finish_reason) said.finish.push(chunk.choices[0].finish_reason);
  const call = await client.chat.completions.create({ model: "teacher", messages, tools });
  said.call = call.choices[0].message.tool_calls[0].function;
  const runner = client.chat.completions.stream({ model: "teacher", messages, tools });
  said.streamedCall = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0].function.arguments;
  const response = await client.responses.create({ model: "teacher", input: "2+2?" });
  said.response = response.output_text;
  said.models = (await client.models.list()).data.map((model) => model.id);
  try {
    await client.withOptions({ apiKey: "wrong" }).chat.completions.create({ model: "policy", messages });
  } catch (error) {
    said.refused = [error.status, error.code];
  }
  console.log(JSON.stringify(said));
}

main();
