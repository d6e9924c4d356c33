// --- setup
import fs from 'node:fs';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateText, isStepCount, Output, streamText, tool } from 'ai';
import { z } from 'zod';

const provider = createOpenAICompatible({
  name: 'qwen2vl',
  apiKey: 'sk-your-key',
  baseURL: 'http://127.0.0.1:8000/v1',
  includeUsage: true,
  supportsStructuredOutputs: true,
});

// --- text
const hello = await generateText({
  model: provider('qwen2-vl-demo'),
  temperature: 0,
  prompt: 'Hello, who are you?',
});
console.log(hello.text);

// --- picture
const circle = await generateText({
  model: provider('qwen2-vl-demo'),
  temperature: 0,
  messages: [
    {
      role: 'user',
      content: [
        { type: 'text', text: 'What colour is the circle?' },
        { type: 'file', mediaType: 'image', data: fs.readFileSync('red_circle.jpg') },
      ],
    },
  ],
});
console.log(circle.text);

// --- address
const byAddress = createOpenAICompatible({
  name: 'qwen2vl',
  apiKey: 'sk-your-key',
  baseURL: 'http://127.0.0.1:8000/v1',
  supportedUrls: () => ({ 'image/*': [/^https?:/] }),
});
const square = await generateText({
  model: byAddress('qwen2-vl-demo'),
  temperature: 0,
  messages: [
    {
      role: 'user',
      content: [
        { type: 'text', text: 'What colour is the square?' },
        { type: 'file', mediaType: 'image', data: 'https://example.org/blue_square.png' },
      ],
    },
  ],
});
console.log(square.text);

// --- several
const messages = [
  {
    role: 'user',
    content: [
      { type: 'file', mediaType: 'image', data: fs.readFileSync('red_circle.jpg') },
      { type: 'file', mediaType: 'image', data: fs.readFileSync('blue_square.png') },
      { type: 'text', text: 'What is in the second picture?' },
    ],
  },
];
const several = await generateText({
  model: provider('qwen2-vl-demo'),
  temperature: 0,
  messages,
});
console.log(several.text, several.usage.totalTokens);

// --- stream
const result = streamText({ model: provider('qwen2-vl-demo'), temperature: 0, messages });
for await (const piece of result.textStream) {
  process.stdout.write(`${piece}|`);
}
console.log(`\n${(await result.usage).outputTokens} tokens`);

// --- structured
const { output } = await generateText({
  model: provider('qwen2-vl-demo'),
  temperature: 0,
  output: Output.object({ schema: z.object({ color: z.string(), shape: z.string() }) }),
  messages: [
    {
      role: 'user',
      content: [
        { type: 'file', mediaType: 'image', data: fs.readFileSync('blue_square.png') },
        { type: 'text', text: 'Return JSON with color, shape.' },
      ],
    },
  ],
});
console.log(output);

// --- tools
const inStock = tool({
  description: 'How many sheets of paper of a colour are in stock.',
  inputSchema: z.object({ colour: z.enum(['red', 'blue']) }),
  execute: async ({ colour }) => `12 ${colour} sheets`,
});
const agent = await generateText({
  model: provider('qwen2-vl-demo'),
  temperature: 0,
  tools: { in_stock: inStock },
  stopWhen: isStepCount(2),
  prepareStep: ({ stepNumber }) => ({
    toolChoice: stepNumber === 0 ? { type: 'tool', toolName: 'in_stock' } : 'none',
  }),
  messages: [
    {
      role: 'user',
      content: [
        { type: 'file', mediaType: 'image', data: fs.readFileSync('red_circle.jpg') },
        { type: 'text', text: 'What colour is the circle?' },
      ],
    },
  ],
});
for (const call of agent.steps[0].toolCalls) {
  console.log(call.toolName, call.input);
}
console.log(agent.text);

// --- wrong key
const stranger = createOpenAICompatible({
  name: 'qwen2vl',
  apiKey: 'sk-wrong',
  baseURL: 'http://127.0.0.1:8000/v1',
});
try {
  await generateText({ model: stranger('qwen2-vl-demo'), prompt: 'Hello' });
} catch (error) {
  if (!APICallError.isInstance(error)) throw error;
  console.log(error.statusCode, error.data.error.code, error.message);
}

// --- no such model
try {
  await generateText({ model: provider('gpt-4o'), prompt: 'Hello' });
} catch (error) {
  if (!APICallError.isInstance(error)) throw error;
  console.log(error.statusCode, error.data.error.code, error.message);
}

// --- too long
try {
  await generateText({ model: provider('qwen2-vl-demo'), prompt: 'word '.repeat(6000) });
} catch (error) {
  if (!APICallError.isInstance(error)) throw error;
  console.log(error.statusCode, error.data.error.code, error.message);
}
