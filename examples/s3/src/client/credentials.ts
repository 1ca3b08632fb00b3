// SPDX-License-Identifier: Apache-2.0
/**
 * Who signs: explicit keys, or what the AWS SDK's own chain finds (environment, shared config and credentials files with profiles,
 * assumed roles, SSO and processes named there, web identity, container and instance metadata).
 *
 * Contract: `get` answers from memory until the credentials near their end, which the chain renews on the side. `refresh` asks the
 * chain anew, whatever it remembers: for when the server calls them expired.
 */
import { ObjectStoreError } from '../object-store.js';

export interface Credentials {
  readonly accessKeyId: string;
  readonly secretAccessKey: string;
  readonly sessionToken?: string | undefined;
  readonly expiration?: Date | undefined;
}

export interface CredentialSource {
  /** @throws ObjectStoreError of kind `credentials` */
  get(): Promise<Credentials>;
  /** Looks for others than those used, which were refused. @returns whether there are */
  refresh(used: Credentials): Promise<boolean>;
}

/** What the SDK's chain answers with; `forceRefresh` goes past what it remembers. */
export type CredentialChain = (options?: { forceRefresh?: boolean }) => Promise<Credentials>;

export class FixedCredentials implements CredentialSource {
  readonly #credentials: Credentials;

  constructor(credentials: Credentials) {
    this.#credentials = credentials;
  }

  get(): Promise<Credentials> {
    return Promise.resolve(this.#credentials);
  }

  refresh(): Promise<boolean> {
    return Promise.resolve(false);
  }
}

export class ChainedCredentials implements CredentialSource {
  readonly #chain: CredentialChain;

  constructor(chain: CredentialChain) {
    this.#chain = chain;
  }

  async get(): Promise<Credentials> {
    try {
      return await this.#chain();
    } catch (cause) {
      throw unavailable(cause);
    }
  }

  async refresh(used: Credentials): Promise<boolean> {
    try {
      // Another request that was refused may have renewed them already.
      if (!same(await this.#chain(), used)) return true;
      return !same(await this.#chain({ forceRefresh: true }), used);
    } catch (cause) {
      throw unavailable(cause);
    }
  }
}

function same(a: Credentials, b: Credentials): boolean {
  return (
    a.accessKeyId === b.accessKeyId &&
    a.secretAccessKey === b.secretAccessKey &&
    a.sessionToken === b.sessionToken
  );
}

function unavailable(cause: unknown): ObjectStoreError {
  const why = cause instanceof Error ? cause.message : String(cause);
  return new ObjectStoreError(
    'credentials',
    `no credentials: ${why}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this host a role`,
    { operation: 'get credentials', cause },
  );
}

export interface ChainOptions {
  readonly profile: string | undefined;
  readonly region: string;
  /** How requests for a role's credentials go out; undefined: the SDK's own way. */
  readonly requestHandler: RequestHandler | undefined;
}

/** The SDK's interface between its clients and HTTP. */
export interface RequestHandler {
  handle(request: SdkRequest, options?: unknown): Promise<{ response: SdkResponse }>;
}

export interface SdkRequest {
  readonly method: string;
  readonly protocol: string;
  readonly hostname: string;
  readonly port?: number;
  readonly path: string;
  readonly query?: Readonly<Record<string, string | readonly string[] | null>>;
  readonly headers: Readonly<Record<string, string>>;
  readonly body?: unknown;
}

export interface SdkResponse {
  statusCode: number;
  headers: Record<string, string>;
  body: unknown;
}

/** Loaded only when asked for: it is most of what this package depends on. */
export async function defaultCredentials(options: ChainOptions): Promise<CredentialSource> {
  const { defaultProvider } = await import('@aws-sdk/credential-provider-node');
  const { profile, region, requestHandler } = options;
  const chain = defaultProvider({
    ...(profile === undefined ? {} : { profile }),
    // Keys that were changed in the files are found when the old ones are refused.
    ignoreCache: true,
    parentClientConfig: {
      region,
      ...(requestHandler === undefined ? {} : { requestHandler }),
    } as NonNullable<Parameters<typeof defaultProvider>[0]>['parentClientConfig'],
  });
  return new ChainedCredentials(chain as CredentialChain);
}
